"""Every kind of control, value and solution survives its file; older, newer and foreign layouts are migrated or refused
by name."""

import copy
import json
from pathlib import Path

import pytest
import torch
from cases import SmallControl, but_slow, random_lq

import sdecontrol as sc
from sdecontrol.controls.base import Control
from sdecontrol.controls.bounded import bounded
from sdecontrol.controls.build import build_control, corrected
from sdecontrol.controls.given import given_control
from sdecontrol.controls.guidance import (
    AnnealedValue,
    ClassifierValue,
    GivenValue,
    TweedieValue,
    ValueControl,
    value_network,
)
from sdecontrol.controls.mixture import MixtureControl
from sdecontrol.controls.path_integral import PathIntegralControl
from sdecontrol.controls.ratio_value import RatioValue
from sdecontrol.controls.saved import CONTROLS, VALUES, Kinds
from sdecontrol.controls.token_guidance import TokenValueControl
from sdecontrol.evaluation.particle_solution import ParticleSettings, ParticleSolution
from sdecontrol.evaluation.solution import SOLUTIONS, Solution
from sdecontrol.files import bundles, migrations
from sdecontrol.files.bundles import read_bundle, write_bundle
from sdecontrol.processes.laws import ProductMixture

pytestmark = pytest.mark.filterwarnings("ignore:.*effective of:RuntimeWarning")

F32, K = torch.float32, 4
SETTINGS = {"time_steps": K, "scheme": None}


def lq(**options):
    return random_lq(2, seed=1, dtype=F32, **options)


def steep(start="fixed"):
    """A reward that spreads over many nats: annealed, with a scaled Langevin term."""
    problem = lq()
    return sc.ControlProblem(
        problem.reference,
        sc.Gaussian(torch.zeros(2), torch.eye(2)),
        reward=lambda x: -200 * (x - 2).square().sum(1),
        alpha=0.5,
        start=start,
    )


def gibbs(reference="ou"):
    return sc.gibbs_problem(lambda x: -(x - 1).square().sum(1), 2, reference)


class Denoiser(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, x, s):
        return self.linear(x) * s.reshape(-1, 1)


def generative():
    sde = sc.generative_sde(Denoiser(), sc.VP(), prediction="noise", shape=(2,))
    return sc.ControlProblem(sde, reward=lambda x: -x.square().sum(1), alpha=0.5)


def letters(x, s):
    return torch.zeros(*x.shape, 3)


def tokens():
    chain = sc.masked_diffusion(letters, 2, 3, steps=K)
    return sc.ControlProblem(chain, reward=lambda x: x.float().sum(1), alpha=0.5)


def shaken(module, seed=3, by=0.1):
    """With parameters of its own: at its start a control may be zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += by * torch.randn(p.shape, generator=generator)
    return module


def push(x, t):
    return 0.3 - x


def logits(x, *s):
    return torch.cat((x, -x), 1)


def mixture(problem):
    return MixtureControl(problem, ProductMixture(torch.rand(2, 3) + 0.1, torch.randn(2, 3), torch.rand(2, 3) + 0.5))


def user():
    return SmallControl(2, 2, seed=7, dtype=F32)


# kind -> problem, its control, and what is given again
CONTROL_CASES = {
    "zero": (lq, lambda p, c: given_control(p, None), {}),
    "given": (lq, lambda p, c: given_control(p, push), {"control": push}),
    "user": (lq, lambda p, c: build_control(p, c, user()), {"control": user()}),
    "network": (lq, lambda p, c: build_control(p, c), {}),
    "started": (lambda: lq(start="controlled"), lambda p, c: build_control(p, c), {}),
    "tuned": (generative, lambda p, c: build_control(p, c), {}),
    "token-network": (tokens, lambda p, c: build_control(p, c), {}),
    "token-value": (tokens, lambda p, c: TokenValueControl(value_network(p, c, 0), p, c), {}),
    "reward-network": (generative, lambda p, c: build_control(p, c, "frozen"), {}),
    "sum": (generative, lambda p, c: build_control(p, c, "both"), {}),
    "mixture": (gibbs, lambda p, c: mixture(p), {}),
    "corrected": (gibbs, lambda p, c: corrected(p, c, mixture(p)), {}),
    "bounded": (lq, lambda p, c: bounded(p, c, None, (-1.0, 2.0), 0), {}),
    "value": (lq, lambda p, c: ValueControl(value_network(p, c, 0), p, c), {}),
    "path-integral": (
        lq,
        lambda p, c: PathIntegralControl(p, c, given_control(p, push), num_paths=8, seed=5),
        {"control": push},
    ),
}

VALUE_CASES = {
    "network": (lq, lambda p, c: value_network(p, c, 0), {}),
    "token-network": (tokens, lambda p, c: value_network(p, c, 0), {}),
    "annealed": (lambda: gibbs("annealed"), lambda p, c: AnnealedValue(p), {}),
    "given": (
        lq,
        lambda p, c: GivenValue(lambda x, t: -x.square().sum(1) * t, p.alpha),
        {"value": lambda x, t: -x.square().sum(1) * t},
    ),
    "ratio": (generative, lambda p, c: RatioValue.of(p, c, (8, 8), 0), {}),
    "tweedie": (generative, lambda p, c: TweedieValue(p, c, logits, 1), {"value": logits}),
    "classifier": (generative, lambda p, c: ClassifierValue(p, logits, 2), {"value": logits}),
}

SOLUTION_CASES = {
    "control": (lq, sc.RewardBackprop(), {"iterations": 2, **SETTINGS}),
    "particles": (
        lq,
        sc.SMC(num_particles=16, proposal=sc.ValueGuidance(), twist="proposal"),
        {"iterations": 2, **SETTINGS},
    ),
    "tempered": (gibbs, sc.TemperedSMC(num_particles=64), {}),
    "chains": (gibbs, sc.MALA(num_chains=32, warm_up=30), {}),
    "importance": (gibbs, sc.AdaptiveImportance(evaluations=3000), {}),
}


@pytest.mark.parametrize(
    "registry, cases", [(CONTROLS, CONTROL_CASES), (VALUES, VALUE_CASES), (SOLUTIONS, SOLUTION_CASES)]
)
def test_every_registered_kind_has_a_case(registry, cases):
    assert set(registry.classes) == set(cases)


def settings_of(problem):
    """A chain of its own has its own steps."""
    return SETTINGS if problem.reference.continuous else {"time_steps": None, "scheme": None}


@pytest.mark.parametrize("kind", CONTROLS.classes)
def test_controls_survive_their_files(tmp_path, kind):
    make, build, given = CONTROL_CASES[kind]
    problem = make()
    settings = settings_of(problem)
    control = shaken(build(problem, problem.chain(**settings)), by=0.01)
    solution = Solution(problem, control, method="as it is", settings=settings, seed=1)
    solution.save(tmp_path)
    again = sc.load(tmp_path, problem, **given)
    assert type(again.control) is type(control) and CONTROLS.describe(again.control) == CONTROLS.describe(control)
    assert CONTROLS.describe(control)["kind"] == kind
    assert torch.equal(again.sample(32, seed=2), solution.sample(32, seed=2))
    if given:
        with pytest.raises(TypeError, match=r"give it again as load\(..., control=module\)"):
            sc.load(tmp_path, problem)


@pytest.mark.parametrize("kind", VALUES.classes)
def test_values_survive_their_files(tmp_path, kind):
    make, build, given = VALUE_CASES[kind]
    problem = make()
    settings = settings_of(problem)
    value = shaken(build(problem, problem.chain(**settings)))
    plain = given_control(problem, None)
    facts = {"particles": ParticleSettings(8, bound=1.5), "method": "as it is", "settings": settings}
    ParticleSolution(problem, plain, twist=value, **facts).save(tmp_path)
    again = sc.load(tmp_path, problem, **given)
    assert isinstance(again, ParticleSolution) and again.particles == facts["particles"]
    assert again.twist is not None and type(again.twist) is type(value)
    assert VALUES.describe(again.twist) == VALUES.describe(value)
    x, t = problem.reference.probe_states(5, problem.dtype, problem.device), torch.tensor(0.4)
    assert torch.equal(again.twist.at(x, t), value.at(x, t))
    if given:
        with pytest.raises(TypeError, match=r"give it again as load\(..., value=function\)"):
            sc.load(tmp_path, problem)


@pytest.mark.parametrize("kind", SOLUTIONS.classes)
def test_solutions_survive_their_files(tmp_path, kind):
    make, method, options = SOLUTION_CASES[kind]
    problem = make()
    solution = sc.solve(problem, method, batch_size=64, seed=0, progress=False, **options)
    solution.save(tmp_path)
    again = sc.load(tmp_path, problem)
    assert type(again) is type(solution) and SOLUTIONS.describe(again) == SOLUTIONS.describe(solution)
    assert SOLUTIONS.describe(solution)["kind"] == kind
    assert torch.equal(again.sample(32, seed=2), solution.sample(32, seed=2))
    assert repr(again.history) == repr(solution.history) and type(again.settings) is dict  # some are nan


# ------------------------------------------------------------------------------------------------ a user's own


class Pull(Control):
    """Of a user: towards a point that is trained."""

    def __init__(self, problem, strength):
        super().__init__(problem.event_shape, problem.control_shape, 0.0, problem.horizon)
        self.strength, self.point = strength, torch.nn.Parameter(torch.zeros(2))

    @property
    def configuration(self):
        return {"strength": self.strength}

    @classmethod
    def from_saved(cls, saved, context):
        return cls(context.problem, saved["strength"])

    def at(self, x, t, y=None):
        return self.strength * (self.point - x)


@pytest.fixture
def registries(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(CONTROLS, "classes", dict(CONTROLS.classes))


def trained(problem, control):
    return sc.solve(
        problem, "reward-backprop", control=control, time_steps=K, iterations=2, batch_size=64, seed=0, progress=False
    )


def test_a_registered_class_of_a_user_needs_not_be_given_again(tmp_path, registries):
    problem = lq()
    unregistered = trained(problem, Pull(problem, 0.5))
    unregistered.save(tmp_path / "given")
    with pytest.raises(TypeError, match=r"load\(..., control=module\)"):
        sc.load(tmp_path / "given", problem)
    given = sc.load(tmp_path / "given", problem, control=Pull(problem, 0.5))
    assert sc.Control.register("pull")(Pull) is Pull
    solution = trained(problem, Pull(problem, 0.5))
    solution.save(tmp_path / "made")
    again = sc.load(tmp_path / "made", problem)
    assert isinstance(again.control, Pull) and again.control.strength == 0.5
    assert isinstance(solution.control, Pull) and again.control.point.any()
    assert torch.equal(again.control.point, solution.control.point)
    for loaded in (again, given):
        assert torch.equal(loaded.sample(32, seed=2), solution.sample(32, seed=2))


def test_a_subclass_of_a_registered_class_is_not_taken_for_it(tmp_path, registries):
    sc.Control.register("pull")(Pull)

    class Push(Pull):
        def at(self, x, t, y=None):
            return -super().at(x, t, y)

    problem = lq()
    trained(problem, Push(problem, 0.5)).save(tmp_path)
    with pytest.raises(TypeError, match=r"load\(..., control=module\)"):
        sc.load(tmp_path, problem)


def test_a_kind_has_one_class_that_can_be_made_again(registries):
    with pytest.raises(ValueError, match="'network' of control is that of DefaultControl"):
        sc.Control.register("network")(Pull)
    with pytest.raises(TypeError, match="Bare needs a classmethod from_saved"):
        sc.Control.register("bare")(type("Bare", (Control,), {}))
    for _ in range(2):  # as a cell of a notebook does
        sc.Control.register("pull")(Pull)
    with pytest.raises(TypeError, match="a list cannot be saved: its class is no registered kind of thing"):
        Kinds("thing").describe([])


# ------------------------------------------------------------------------------------------------ other layouts


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    problem, folder = lq(), tmp_path_factory.mktemp("written")
    solution = trained(problem, None)
    solution.save(folder)
    return problem, solution, *read_bundle(folder, "solution", "solution")


def rewritten(folder, written, change):
    """The bundle with its settings changed, and right checksums."""
    _, _, tensors, settings = written
    settings = copy.deepcopy({k: v for k, v in settings.items() if k not in ("tensors", "sha256", "settings_sha256")})
    change(settings)
    write_bundle(folder, "solution", tensors, settings)


UNREADABLE = {
    "a newer schema": (
        lambda s: s.update(schema=migrations.SCHEMA + 1),
        f"schema number {migrations.SCHEMA + 1}.*reads 1 to {migrations.SCHEMA}.*version that wrote",
    ),
    "a schema of words": (lambda s: s.update(schema="two"), "schema number 'two'"),
    "a schema that is true": (lambda s: s.update(schema=True), "schema number True"),
    "schema 0": (lambda s: s.update(schema=0), "schema number 0"),
    "an unknown control": (
        lambda s: s["control"].update(kind="spline"),
        "control of the unknown kind 'spline'; known: .*network",
    ),
    "a control without kind": (lambda s: s["control"].pop("kind"), "the control has no field 'kind'"),
    "a control without a field": (lambda s: s["control"].pop("hidden"), "the control has no field 'hidden'"),
    "a control of words": (lambda s: s.update(control="network"), "the control must say what it is"),
    "an unknown solution": (
        lambda s: s["solution"].update(kind="oracle"),
        "solution of the unknown kind 'oracle'; known: .*tempered",
    ),
    "particles without settings": (
        lambda s: s["solution"].update(kind="particles"),
        "the solution has no field 'twist'",
    ),
    "no fingerprint": (lambda s: s.pop("problem"), "no field 'problem'"),
    "another kind of file": (lambda s: s.update(kind="checkpoint"), "holds a 'checkpoint', not a 'solution'"),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, written, what):
    change, message = UNREADABLE[what]
    rewritten(tmp_path, written, change)
    with pytest.raises(sc.BadFileError, match=message):
        sc.load(tmp_path, written[0])


FIRST = """{"format": "sdecontrol-1", "kind": "solution", "method": "reward-backprop", "seed": 0, "reproducible": true,
"settings": {"time_steps": 4, "scheme": null}, "history": [], "details": {}, %s,
"control": {"kind": "network", "hidden": [64, 64], "condition_size": 0, "classes": 0, "gate": true,
"nonlinear": false}}"""
MORE = {
    "control": '"details": {}',
    "particles": '"particles": {"num_particles": 16, "ess_threshold": 0.5, "resampling": "systematic", "selection": '
    '"weights", "independent": false, "bound": null}, "twist": {"kind": "network", "hidden": [64, 64], '
    '"condition_size": 0, "classes": 0}',
}


@pytest.mark.parametrize("kind", MORE)
def test_files_without_a_schema_number_are_read(tmp_path, written, kind, monkeypatch):
    """As the first versions wrote them, up to commit 7dae2a9: what a kind of solution has stands beside what all
    have."""
    problem, solution, tensors, _ = written
    twist = value_network(problem, problem.chain(K), 0)
    if kind == "particles":
        tensors = tensors | {f"twist.{name}": value for name, value in twist.state_dict().items()}
    body = {**json.loads(FIRST % MORE[kind]), "problem": problem.fingerprint(former=True)}
    monkeypatch.setattr(bundles, "SCHEMA", 1)
    write_bundle(tmp_path, "solution", tensors, body)
    monkeypatch.undo()
    path = tmp_path / "solution.json"
    body = json.loads(path.read_text())
    del body["schema"]
    body["settings_sha256"] = bundles.checksum(body)
    path.write_text(json.dumps(body))
    again = sc.load(tmp_path, problem)
    if kind == "control":
        assert torch.equal(again.sample(32, seed=2), solution.sample(32, seed=2))
    else:
        x, t = torch.randn(5, 2), torch.tensor(0.4)
        assert isinstance(again, ParticleSolution) and again.twist is not None and again.particles.num_particles == 16
        assert torch.equal(again.twist.at(x, t), twist.at(x, t))
        assert torch.equal(again.control(x, t), solution.control(x, t))
    again.save(tmp_path / "anew")
    assert json.loads((tmp_path / "anew" / "solution.json").read_text())["schema"] == migrations.SCHEMA
    assert type(sc.load(tmp_path / "anew", problem)) is type(again)


#: names up to commit e12b0aa (schema number 2), of fields and of tensors
FORMER = {
    "schedule": "pace",
    "annealing": "cooling",
    "anneal": "cooling",
    "beta": "strength",
    "iterations": "ended",
    "langevin": "gate",
    "leapfrog_steps": "leaps",
    "unchanged": "quiet",
    "since_taken_back": "calm",
    "langevin_scale": "gate_scale",
    "radial_basis": "nonlinear",
    "radial": "bent",
}
FORMER_TENSORS = FORMER | {"step_size": "steps", "thin": "apart"}


def in_former_names(folder, problem, monkeypatch):
    """Write the bundles of a folder anew, as schema number 2 had them."""

    def former(saved):
        if isinstance(saved, dict):
            return {FORMER.get(name, name): former(part) for name, part in saved.items()}
        return saved

    own = ("format", "schema", "tensors", "sha256", "settings_sha256")
    for path in Path(folder).glob("*.json"):
        tensors, settings = read_bundle(folder, path.stem, json.loads(path.read_text())["kind"])
        tensors = {
            ".".join(FORMER_TENSORS.get(p, p) for p in name.split(".")): value for name, value in tensors.items()
        }
        settings = former({name: value for name, value in settings.items() if name not in own})
        settings["problem"]["numbers"] = problem.fingerprint(former=True)["numbers"]
        with monkeypatch.context() as patch:
            patch.setattr(bundles, "SCHEMA", 2)
            write_bundle(folder, path.stem, tensors, settings)


def test_a_file_of_schema_2_knows_its_problem_by_the_numbers_of_its_time(tmp_path, written):
    """They were taken at other random states, and its start was drawn otherwise."""
    problem, solution, tensors, settings = written
    then = {**problem.fingerprint(former=True)["numbers"], "initial": [0.0]}
    other = {**settings, "problem": {**settings["problem"], "numbers": then}}

    def rewrite(schema, **facts):
        write_bundle(tmp_path, "solution", tensors, {**other, "problem": {**other["problem"], **facts}})
        path = tmp_path / "solution.json"
        body = {**json.loads(path.read_text()), "schema": schema}
        body["settings_sha256"] = bundles.checksum(body)
        path.write_text(json.dumps(body))

    rewrite(2)
    assert torch.equal(sc.load(tmp_path, problem).sample(32, seed=2), solution.sample(32, seed=2))
    moved = {**then, "drift": [value + 0.1 for value in then["drift"]]}
    for schema, facts in ((2, {"alpha": 7.0}), (2, {"numbers": moved}), (migrations.SCHEMA, {})):
        rewrite(schema, **facts)
        with pytest.raises(sc.BadFileError, match="belongs to another problem"):
            sc.load(tmp_path, problem)


def of_schema_4(folder, settings):
    """Rewrite the bundles of a folder as schema number 4 had them, with these settings of a chain."""
    for path in Path(folder).glob("*.json"):
        body = json.loads(path.read_text())
        (body if "settings" in body else body["identity"])["settings"] = settings
        body["schema"] = 4
        body["settings_sha256"] = bundles.checksum(body)
        path.write_text(json.dumps(body))


def test_of_a_generative_reference_a_number_of_steps_was_so_many_equal_euler_steps(tmp_path):
    one = sc.GaussianMixture(torch.ones(1), torch.tensor([[0.5]]), 0.25)
    problem = sc.ControlProblem(sc.generative_sde(one, sc.VP()), reward=sc.Linear(torch.ones(1)))
    then = {"time_steps": [0.0, 0.25, 0.5, 0.75, 1.0], "scheme": "euler"}
    options = {"batch_size": 64, "seed": 0, "progress": False, **then}
    solution = sc.solve(problem, "reward-backprop", iterations=2, checkpoint_dir=tmp_path / "run", **options)
    solution.save(tmp_path / "saved")
    for saved in ({"time_steps": K, "scheme": None}, {"time_steps": K, "scheme": "euler"}):
        of_schema_4(tmp_path / "saved", saved)
        again = sc.load(tmp_path / "saved", problem)
        assert again.settings == then and torch.equal(again.sample(32, seed=2), solution.sample(32, seed=2))
        of_schema_4(tmp_path / "run", saved)
        resumed = {"iterations": 2, "checkpoint_dir": tmp_path / "run", "resume": True}
        sc.solve(problem, "reward-backprop", **resumed, **options)
        with pytest.raises(ValueError, match="this run has settings"):
            sc.solve(problem, "reward-backprop", **resumed, **{**options, "time_steps": K, "scheme": None})
    of_schema_4(tmp_path / "saved", {"time_steps": K, "scheme": "exponential"})
    with pytest.raises(sc.BadFileError, match="another way"):
        sc.load(tmp_path / "saved", problem)


def test_checkpoints_without_a_schema_number_are_resumed(tmp_path, monkeypatch):
    class Stop:
        def on_step_end(self, state):
            if state.iteration == 4:
                raise KeyboardInterrupt

    def run(folder, **more):
        options = {"time_steps": K, "batch_size": 64, "seed": 0, "progress": False, "checkpoint_dir": folder}
        return sc.solve(lq(), "reward-backprop", iterations=6, checkpoint_every=2, **options, **more)

    def age(folder):
        for path in Path(folder).glob("checkpoint-*.json"):
            body = json.loads(path.read_text())
            del body["schema"], body["identity"]["cooling"]
            body["format"] = "sdecontrol-1"
            body["settings_sha256"] = bundles.checksum(body)
            path.write_text(json.dumps(body))

    for name in ("old", "new"):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / name, callbacks=[Stop()])
    in_former_names(tmp_path / "old", lq(), monkeypatch)
    age(tmp_path / "old")
    old, new = (run(tmp_path / name, resume=True) for name in ("old", "new"))
    assert old.iterations == 6 and torch.equal(old.sample(32, seed=2), new.sample(32, seed=2))


@pytest.mark.parametrize("kind", ["network", "started", "corrected", "user"])
def test_controls_in_former_names_are_read(tmp_path, monkeypatch, kind):
    make, build, given = CONTROL_CASES[kind]
    problem = steep(start="controlled") if kind == "started" else make()
    control = shaken(build(problem, problem.chain(K)), by=0.01)
    solution = Solution(problem, control, method="as it is", settings=SETTINGS, seed=1)
    solution.save(tmp_path)
    in_former_names(tmp_path, problem, monkeypatch)
    again = sc.load(tmp_path, problem, **given)
    assert CONTROLS.describe(again.control) == CONTROLS.describe(control)
    assert torch.equal(again.sample(32, seed=2), solution.sample(32, seed=2))


@pytest.mark.parametrize("kind", SOLUTIONS.classes)
def test_solutions_in_former_names_are_read(tmp_path, monkeypatch, kind):
    make, method, options = SOLUTION_CASES[kind]
    problem = make()
    solution = sc.solve(problem, method, batch_size=64, seed=0, progress=False, **options)
    solution.save(tmp_path)
    in_former_names(tmp_path, solution.problem, monkeypatch)
    again = sc.load(tmp_path, problem)
    assert SOLUTIONS.describe(again) == SOLUTIONS.describe(solution)
    assert torch.equal(again.sample(32, seed=2), solution.sample(32, seed=2))


RESUMED = {
    "annealed": (lambda: steep(), sc.LogVariance(), 40),
    "least squares": (lambda: steep(), sc.AdjointMatching(), 6),
    "with a learned start": (lambda: steep(start="controlled"), sc.RewardBackprop(), 6),
    "rounds": (gibbs, sc.Auto(num_particles=64), 3),
}


@pytest.mark.parametrize("what", but_slow(RESUMED, "annealed", "with a learned start"))
def test_checkpoints_in_former_names_are_resumed(tmp_path, monkeypatch, what):
    make, method, iterations = RESUMED[what]

    class Stop:
        def on_step_end(self, state):
            if state.iteration == 2:
                raise KeyboardInterrupt

    options = {"iterations": iterations, "batch_size": 64, "seed": 0, "progress": False, "checkpoint_every": 1}
    whole = sc.solve(make(), method, **options)
    stopped = pytest.warns(UserWarning, match="interrupted") if method.anytime else pytest.raises(KeyboardInterrupt)
    with stopped:
        sc.solve(make(), method, **options, checkpoint_dir=tmp_path, callbacks=[Stop()])
    in_former_names(tmp_path, make(), monkeypatch)
    resumed = sc.solve(make(), method, **options, checkpoint_dir=tmp_path, resume=True)
    assert repr(resumed.history) == repr(whole.history)  # nan where there is no gradient
    assert torch.equal(resumed.sample(32, seed=2), whole.sample(32, seed=2))


# ------------------------------------------------------------------------------------------------ masks


class Masked(torch.nn.Module):
    """A user's module with a mask of an attention: ``0`` and ``-inf``, and a buffer of numbers."""

    def __init__(self, *, wide=0):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2 + wide)
        self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
        self.register_buffer("numbers", torch.zeros(2))

    def forward(self, x, t):
        scores = self.linear(x).unsqueeze(1) + self.mask
        return (scores.softmax(-1) @ x.unsqueeze(-1)).squeeze(-1) + self.numbers


def masked_solution(kind):
    """A trained user's control, or a tuned model, with its problem and how it is loaded."""
    if kind == "control":
        problem = lq()
        return sc.solve(problem, control=Masked(), iterations=2, **SOLVED), problem, {"control": Masked()}
    sde = sc.generative_sde(Masked(), sc.VP(), prediction="noise", shape=(2,))
    problem = sc.ControlProblem(sde, reward=lambda x: -x.square().sum(1), alpha=0.5, start="fixed")
    return sc.solve(problem, iterations=2, **SOLVED), problem, {}


SOLVED = {"method": sc.RewardBackprop(), "time_steps": K, "batch_size": 64, "seed": 0, "progress": False}


@pytest.mark.parametrize("kind", ["control", "model"])
def test_a_module_with_a_mask_survives_its_file(tmp_path, kind):
    solution, problem, given = masked_solution(kind)
    solution.save(tmp_path)
    again = sc.load(tmp_path, problem, **given)
    assert torch.equal(again.sample(32, seed=2), solution.sample(32, seed=2))
    resumed = sc.solve(problem, control=given.get("control"), iterations=2, **SOLVED, checkpoint_dir=tmp_path / "c")
    last = {"checkpoint_dir": tmp_path / "c", "resume": True}
    again = sc.solve(problem, control=given.get("control"), iterations=2, **SOLVED, **last)
    assert torch.equal(again.sample(32, seed=2), resumed.sample(32, seed=2))


@pytest.mark.parametrize(
    "part, value", [("linear.weight", torch.inf), ("linear.weight", torch.nan), ("numbers", torch.nan)]
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, part, value):
    solution, *_ = masked_solution("control")
    with torch.no_grad():
        solution.control.state_dict()[f"module.{part}"].fill_(value)
    with pytest.raises(ValueError, match=rf"module.{part} has \d non-finite entries"):
        solution.save(tmp_path)
    assert not list(tmp_path.iterdir())
