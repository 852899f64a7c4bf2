"""What travels to another process arrives: errors, problems on every kind of reference, chains, paths, controls,
values, solutions and exact solutions. Kinds are found by their registries and base classes: a new one has no case here,
and the first test says so."""

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from cases import SmallControl
from rooms import MODULES

import sdecontrol as sc
from sdecontrol import errors
from sdecontrol.chains.annealed import ReversedChain
from sdecontrol.chains.base import Chain
from sdecontrol.chains.categorical import CategoricalChain
from sdecontrol.chains.relaxed import RelaxedMasking
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
from sdecontrol.controls.saved import CONTROLS, VALUES
from sdecontrol.controls.token_guidance import TokenValueControl
from sdecontrol.evaluation.solution import SOLUTIONS, Solution
from sdecontrol.exact.base import ExactSolution
from sdecontrol.processes.laws import ProductMixture
from sdecontrol.processes.reference import Reference

pytestmark = pytest.mark.filterwarnings("ignore:.*effective of:RuntimeWarning")
K, WAIT = 4, 300.0


# ------------------------------------------------------------------------------------------------ a user's functions


def pull(x, t):
    return -x


def swirl(x, t):
    return torch.stack((x[:, 1].sin(), -x[:, 0]), 1)


def push(x, t):
    return 0.3 - x


def noise(x, t):
    return 1 + 0.1 * x.cos()


def reward(x):
    return -(x - 1).square().sum(1)


def tokens(x):
    return x.sum(1).to(torch.float32)


def angles(x):
    return x.sin().sum((1, 2))


def effort(x, t):
    return 0.1 * x.square().sum(1)


def bowl(x):
    return -(x - 1).square().sum(1)


def value(x, t):
    return -x.square().sum(1) * t


def logits(x, *s):
    return torch.cat((x, -x), 1)


def step(x, w, k):
    return 0.9 * x + 0.3 * w


def letters(k, x):
    return torch.zeros(*x.shape, 3).log_softmax(-1)


def height(x):
    return x[:, -1]


def spin(x, t):
    return torch.stack((-x[:, 1], x[:, 0], 0 * x[:, 2]), 1)


def louder(t):
    return 0.5 + t


def uniform(x, s):
    return torch.zeros(*x.shape, 3)


def ring(speed=1.0):
    return speed * (torch.roll(torch.eye(4), 1, 1) - torch.eye(4))


def growing(t):
    return ring(1 + 0.5 * float(t))


def rate(t):
    return -(1 + t) * torch.eye(2)


class Foreign:
    noise_type, sde_type = "diagonal", "ito"

    def f(self, t, y):
        return -y

    def g(self, t, y):
        return torch.ones_like(y)


class Both(Foreign):
    f = g = None

    def f_and_g(self, t, y):
        return -y, torch.ones_like(y)


class Denoiser(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, x, s):
        return self.linear(x) * s.reshape(-1, 1).to(x.dtype)


# ------------------------------------------------------------------------------------------------ one of every kind


def start():
    return sc.Dirac(torch.zeros(2))


def of(reference, **options):
    given = {"initial": start(), "reward": sc.Linear(torch.ones(2)), "running_cost": effort, "alpha": 0.7, **options}
    return sc.ControlProblem(reference, **given)


def lq(**options):
    sde = sc.LinearSDE(-torch.eye(2), torch.eye(2))
    return of(sde, **{"reward": sc.Quadratic(torch.eye(2), torch.ones(2)), "running_cost": None, **options})


def law():
    return sc.GaussianMixture(torch.tensor([0.4, 0.6]), torch.tensor([[-2.0, 0.0], [1.5, 1.0]]), 0.3)


def generative(model=None):
    sde = sc.generative_sde(law() if model is None else model, sc.VP(), shape=(2,))
    return of(sde, initial=None, running_cost=None)


def diffusion():
    chain = sc.diffusion_chain(Denoiser(), torch.linspace(0.99, 0.02, 10), shape=(2,), steps=K)
    return of(chain, initial=None, running_cost=None, start="fixed")


class Network(Denoiser):
    """As diffusers has them."""

    def forward(self, sample, timestep):
        return super().forward(sample, timestep)


def of_diffusers():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(variance_type="fixed_large", steps_offset=1)
    chain = sc.from_diffusers(Network(), scheduler, steps=K, shape=(2,))
    return of(chain, initial=None, running_cost=None, start="fixed")


def gibbs(reference="ou"):
    return sc.gibbs_problem(bowl, 2, reference, seed=0)


def categorical():
    return sc.ControlProblem(CategoricalChain(letters, K, 3, torch.zeros(2, dtype=torch.int64)), reward=tokens)


def masked(order="independent"):
    return sc.ControlProblem(sc.masked_diffusion(uniform, 2, 3, order=order), reward=tokens)


def of_probabilities(x, s):
    """Logits of tokens, or of probabilities of tokens."""
    return torch.zeros(*x.shape[:2], 3) + 0.1 * x.sum(-1).reshape(len(x), -1)[:, :1, None]


def relaxed():
    return sc.ControlProblem(sc.masked_diffusion(of_probabilities, 2, 3), reward=tokens)


def jumps(rates=None, sparse=False, stop=None, start=None):
    given = ring() if rates is None else rates
    process = sc.JumpProcess(
        given.to_sparse() if sparse else given, initial=1 if start is None else torch.ones(len(given))
    )
    return sc.ControlProblem(process, reward=tokens, stop=stop, start=start)


def at_two(x):
    return x[:, 0] == 2


def far(x):
    return 1.2 - x.norm(dim=1)


def stopping():
    return of(sc.SDE(pull, noise, dim=2), stop=sc.Region(far, boundary_correction=False))


def sphere(drift=None, sigma=1.0):
    reference = sc.ManifoldSDE(sc.Sphere(2), drift, sigma, initial=sc.Dirac(torch.tensor([0.0, 0.6, 0.8])))
    return sc.ControlProblem(reference, reward=height, running_cost=effort, alpha=0.7)


REFERENCES = {
    "SDE": lambda: of(sc.SDE(pull, noise, dim=2)),
    "SDE of torchsde": lambda: of(sc.SDE.from_torchsde(Foreign(), dim=2)),
    "SDE of torchsde, both": lambda: of(sc.SDE.from_torchsde(Both(), dim=2)),
    "SimplexDiffusion": lambda: sc.ControlProblem(sc.library.SimplexDiffusion(2, 3), reward=angles),
    "LinearSDE": lq,
    "LinearSDE of time": lambda: of(sc.LinearSDE(rate, torch.eye(2))),
    "LinearSDE, a learned start": lambda: lq(initial=sc.Gaussian(torch.zeros(2), 1.0), start="controlled"),
    "SemilinearSDE": lambda: of(sc.SemilinearSDE(-torch.eye(2), swirl, torch.eye(2))),
    "GenerativeSDE": generative,
    "GenerativeSDE of a model": lambda: generative(Denoiser()),
    "TimeChanged": gibbs,
    "TimeChanged, brownian": lambda: gibbs("brownian"),
    "AnnealedLangevin": lambda: gibbs("annealed"),
    "DiffusionChain": diffusion,
    "DiffusersChain": of_diffusers,
    "NoiseDrivenChain": lambda: of(sc.discrete_dynamics(step, K, dim=2, noises=2)),
    "CategoricalChain": categorical,
    "MaskedDiffusionChain": masked,
    "MaskedDiffusionChain, in random order": lambda: masked("random"),
    "ManifoldSDE": sphere,
    "ManifoldSDE, with a drift and noise of time": lambda: sphere(spin, louder),
    "ManifoldSDE, a torus": lambda: sc.ControlProblem(
        sc.ManifoldSDE(sc.Torus(2), swirl), sc.Torus(2).uniform(), reward=tokens
    ),
    "JumpProcess": jumps,
    "JumpProcess, sparse": lambda: jumps(sparse=True),
    "JumpProcess, a learned start": lambda: jumps(start="controlled"),
    "JumpProcess of time": lambda: jumps(growing),
}
CHAINS = {
    "EulerChain": lambda: lq().chain(K),
    "TransitionChain": lambda: lq().chain(K, "exact"),
    "TransitionChain of a model": lambda: of(
        sc.generative_sde(sc.GaussianMixture(torch.ones(1), torch.ones(1, 2), 0.5), sc.VP()), initial=None
    ).chain(K, "exact"),
    "ExponentialChain": lambda: REFERENCES["SemilinearSDE"]().chain(K, "exponential"),
    "GenerativeExponentialChain": lambda: generative().chain(K, "exponential").main,
    "AnnealedChain": lambda: gibbs("annealed").chain(K),
    "ReversedChain": lambda: ReversedChain(gibbs("annealed").chain(K)),
    "LearnedStart": lambda: REFERENCES["LinearSDE, a learned start"]().chain(K).segments[0],
    "SegmentedChain": lambda: REFERENCES["LinearSDE, a learned start"]().chain(K),
    "DiffusionChain": lambda: diffusion().chain(),
    "DiffusersChain": lambda: of_diffusers().chain(),
    "NoiseDrivenChain": lambda: REFERENCES["NoiseDrivenChain"]().chain(),
    "CategoricalChain": lambda: categorical().chain(),
    "MaskedDiffusionChain": lambda: masked().chain(),
    "RelaxedMasking": lambda: RelaxedMasking(relaxed().chain(), 0.5, True),
    "ManifoldChain": lambda: sphere().chain(K),
    "JumpChain": lambda: jumps().chain(K),
    "StoppedChain": lambda: stopping().chain(K),
    "FiniteStart": lambda: jumps(start="controlled").chain(K).segments[0],
    "StartedTokens": lambda: jumps(start="controlled").chain(K),
    "StoppedChain of tokens": lambda: jumps(stop=at_two).chain(K),
    "JumpChain, sparse": lambda: jumps(sparse=True).chain(K),
}


def mixture(p):
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.rand(2, 3, generator=generator) + 0.3  # noqa: E731
    return MixtureControl(p, ProductMixture(draw(), draw(), draw()))


def user():
    return SmallControl(2, 2, seed=7, dtype=torch.float32)


CONTROL_CASES = {
    "zero": (lq, lambda p, c: given_control(p, None)),
    "given": (lq, lambda p, c: given_control(p, push)),
    "user": (lq, lambda p, c: build_control(p, c, user())),
    "network": (lambda: lq(reward=reward), build_control),
    "started": (REFERENCES["LinearSDE, a learned start"], build_control),
    "tuned": (lambda: generative(Denoiser()), build_control),
    "token-network": (masked, build_control),
    "token-value": (masked, lambda p, c: TokenValueControl(value_network(p, c, 0), p, c)),
    "reward-network": (lambda: generative(Denoiser()), lambda p, c: build_control(p, c, "frozen")),
    "sum": (lambda: generative(Denoiser()), lambda p, c: build_control(p, c, "both")),
    "mixture": (gibbs, lambda p, c: mixture(p)),
    "corrected": (gibbs, lambda p, c: corrected(p, c, mixture(p))),
    "bounded": (lq, lambda p, c: bounded(p, c, None, (-1.0, 2.0), 0)),
    "value": (lq, lambda p, c: ValueControl(value_network(p, c, 0), p, c)),
    "path-integral": (lq, lambda p, c: PathIntegralControl(p, c, given_control(p, push), num_paths=8, seed=5)),
}
VALUE_CASES = {
    "network": (lq, lambda p, c: value_network(p, c, 0)),
    "token-network": (masked, lambda p, c: value_network(p, c, 0)),
    "annealed": (lambda: gibbs("annealed"), lambda p, c: AnnealedValue(p)),
    "given": (lq, lambda p, c: GivenValue(value, p.alpha)),
    "ratio": (lambda: generative(Denoiser()), lambda p, c: RatioValue.of(p, c, (8, 8), 0)),
    "tweedie": (lambda: generative(Denoiser()), lambda p, c: TweedieValue(p, c, logits, 1)),
    "classifier": (lambda: generative(Denoiser()), lambda p, c: ClassifierValue(p, logits, 2)),
}
SOLUTION_CASES = {
    "control": (lq, sc.RewardBackprop(), {"iterations": 2, "time_steps": K}),
    "particles": (lq, sc.SMC(num_particles=16, proposal=sc.ValueGuidance(), twist="proposal"), {"time_steps": K}),
    "tempered": (gibbs, sc.TemperedSMC(num_particles=64), {}),
    "importance": (gibbs, sc.AdaptiveImportance(evaluations=3000), {}),
    "chains": (gibbs, sc.MALA(num_chains=32, warm_up=30), {}),
}
EXACT = {
    "RiccatiSolution": lambda: sc.exact_solution(lq()),
    "ChainSolution": lambda: sc.exact_solution(lq(), time_steps=K),
    "MixtureSolution": lambda: sc.exact_solution(generative()),
    "GridSolution": lambda: sc.exact_solution(one_dimensional()),
    "GridChainSolution": lambda: sc.exact_solution(one_dimensional(), time_steps=K),
    "TurnedSolution": lambda: sc.exact_solution(apart(), time_steps=K),
    "ManifoldSolution": lambda: sc.exact_solution(sphere(), time_steps=K),
    "FiniteChainSolution": lambda: sc.exact_solution(categorical()),
    "FiniteProcessSolution": lambda: sc.exact_solution(jumps()),
    "StoppedChainSolution": lambda: sc.exact_solution(one_dimensional(stop=far), time_steps=K),
    "StoppedPlaneSolution": lambda: sc.exact_solution(one_dimensional(stop=far, dim=2), time_steps=K),
}


def apart():
    """Two components in three dimensions, which differ in one direction."""
    means = torch.tensor([[0.0, 0.5, 1.0], [1.0, -0.5, 0.4]])
    mixture = sc.GaussianMixture(torch.ones(2), means, 0.3)
    start = sc.Dirac(torch.zeros(3))
    return sc.ControlProblem(sc.generative_sde(mixture, sc.VP()), start, sc.Linear(torch.ones(3)), alpha=1.0)


def one_dimensional(dim=1, **options):
    sde = sc.SDE(pull, torch.tensor(1.0), dim=dim)
    return sc.ControlProblem(sde, sc.Dirac(torch.zeros(dim)), reward=reward, alpha=1.0, **options)


def kinds(base):
    """All kinds of the package below a base class."""
    found = {kind for cls in base.__subclasses__() for kind in (cls, *kinds(cls))}
    return {kind for kind in found if kind.__module__.startswith("sdecontrol.")}


ABSTRACT = {"Pretrained", "PretrainedChain", "OnGrids", "LinearQuadraticSolution"}
ABSTRACT |= {"CategoricalKernels", "FiniteSolution", "StoppedSolution"}


@pytest.mark.parametrize("base, cases", [(Reference, REFERENCES), (Chain, CHAINS), (ExactSolution, EXACT)])
def test_every_class_has_a_case(base, cases):
    names = {kind.__name__ for kind in kinds(base)} - ABSTRACT
    assert names == {case.split(" of ")[0].split(",")[0] for case in cases}


@pytest.mark.parametrize(
    "registry, cases", [(CONTROLS, CONTROL_CASES), (VALUES, VALUE_CASES), (SOLUTIONS, SOLUTION_CASES)]
)
def test_every_registered_kind_has_a_case(registry, cases):
    assert set(registry.classes) == set(cases)


# ------------------------------------------------------------------------------------------------ and in a worker


@pytest.fixture(scope="module")
def worker():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=WAIT)


@torch.no_grad()
def called(function, *arguments):
    return function(*arguments)


def agree(worker, function, *arguments):
    """The same numbers here and there."""
    here, there = called(function, *arguments), worker(called, function, *arguments)
    assert torch.equal(here, there) and bool(torch.isfinite(here).all())


def ends(problem):
    steps = K if problem.reference.continuous else None
    paths = sc.simulate(problem, 8, time_steps=steps, seed=1, keep="end")
    return torch.cat((paths.samples.flatten(1), paths.log_weights().unsqueeze(1)), 1)


@pytest.mark.parametrize("case", REFERENCES)
def test_problems(worker, case):
    problem = REFERENCES[case]()
    ends(problem)  # with chains in its cache
    agree(worker, ends, problem)


def stepped(chain):
    generator = torch.Generator().manual_seed(0)
    draw = lambda shape: torch.randn(8, *shape, generator=generator)  # noqa: E731
    tokens = chain.state_dtype is not None
    x = torch.zeros(8, *chain.event_shape, dtype=torch.int64) if tokens else draw(chain.event_shape)
    moved = chain.step(1, x, draw(chain.noise_shape))
    c = chain.shift_at(1, x, 0.0 * draw(chain.control_shape) + 0.5)
    return torch.cat((moved.flatten().double(), c.flatten().double(), chain.times.double()))


@pytest.mark.parametrize("case", CHAINS)
def test_chains(worker, case):
    agree(worker, stepped, CHAINS[case]())


def read(paths):
    parts = (paths.states, paths.shifts, paths.noises, paths.log_ratio(), paths.log_weights(), paths.samples)
    return torch.cat([part.flatten().double() for part in parts])


@pytest.mark.parametrize("keep", ["all", "states", "end"])
@pytest.mark.parametrize("case", ["SDE", "LinearSDE, a learned start", "AnnealedLangevin", "CategoricalChain"])
def test_paths(worker, case, keep):
    problem = REFERENCES[case]()
    steps = K if problem.reference.continuous else None
    agree(worker, read, sc.simulate(problem, 8, time_steps=steps, seed=1, keep=keep))


def test_paths_of_a_solver(worker):
    paths = sc.simulate(lq(), 8, control=push, time_steps=K, scheme="heun", seed=1, keep="end")
    agree(worker, states_of, paths)


def states_of(paths):
    return paths.states


def drawn(solution):
    return solution.simulate(8, seed=1, keep="end").samples


def steps_of(problem):
    return K if problem.reference.continuous else None


@pytest.mark.parametrize("kind", CONTROLS.classes)
def test_controls(worker, kind):
    make, build = CONTROL_CASES[kind]
    problem = make()
    steps = steps_of(problem)
    control = build(problem, problem.chain(steps))
    agree(worker, drawn, Solution(problem, control, method="as it is", settings={"time_steps": steps, "scheme": None}))


def at(value, tokens):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(3, (8, 2), generator=generator) if tokens else torch.randn(8, 2, generator=generator)
    return value.at(x, torch.tensor(0.4)).detach()


@pytest.mark.parametrize("kind", VALUES.classes)
def test_values(worker, kind):
    make, build = VALUE_CASES[kind]
    problem = make()
    tokens = problem.reference.state_dtype is not None
    agree(worker, at, build(problem, problem.chain(steps_of(problem))), tokens)


def evaluated(solution):
    ev = solution.evaluate(64, seed=2)
    return torch.cat((solution.sample(8, seed=1).flatten().double(), torch.tensor([ev.reward.value, ev.log_z.value])))


@pytest.mark.parametrize("kind", SOLUTIONS.classes)
def test_solutions(worker, kind):
    make, method, options = SOLUTION_CASES[kind]
    solution = sc.solve(make(), method, batch_size=64, seed=0, progress=False, **options)
    solution.evaluate(64, seed=2)  # with what it has looked up
    agree(worker, evaluated, solution)
    again = pickle.loads(pickle.dumps(solution))
    assert torch.equal(again.sample(8, seed=1), solution.sample(8, seed=1))


def optimum(exact):
    d = exact.problem.event_shape[0]
    x = torch.linspace(-1, 1, 4 * d).reshape(4, d)
    x = exact.problem.reference.onto(x) if exact.problem.reference.state_dtype is None else x.abs().round().long()
    return torch.cat((exact.control(x, 0.25).flatten(), exact.value(x, 0.25), exact.log_z.reshape(1)))


@pytest.mark.parametrize("case", EXACT)
def test_exact_solutions(worker, case):
    exact = EXACT[case]()
    optimum(exact)  # with what it remembers
    agree(worker, optimum, exact)
    agree(worker, controlled_by, exact.control, exact.problem)


def controlled_by(control, problem):
    return sc.simulate(
        problem, 8, control=control, time_steps=K if problem.reference.continuous else None, seed=1
    ).states


# ------------------------------------------------------------------------------------------------ errors


def exceptions():
    """All exceptions of the package."""
    for name in MODULES:
        if name != "__main__" and not name.startswith("cli"):
            __import__(f"sdecontrol.{name}".removesuffix(".__init__"))
    queue, found = [Exception], set()
    while queue:
        for kind in queue.pop().__subclasses__():
            queue.append(kind)
            if kind.__module__.startswith("sdecontrol.") and kind not in found:
                found.add(kind)
    return sorted(found, key=lambda kind: kind.__name__)


def raising(error):
    raise error


def an_error(kind):
    if kind is errors.NonFiniteError:
        return kind("state is not finite", what="state", step=3, rows=2)
    return kind("what was wrong")


@pytest.mark.parametrize("kind", exceptions(), ids=lambda kind: kind.__name__)
def test_errors(worker, kind):
    error = an_error(kind)
    error.add_note("more")
    with pytest.raises(kind) as caught:
        worker(raising, error)
    assert type(caught.value) is kind and str(caught.value) == str(error) and caught.value.args == error.args
    for name in ("what", "step", "rows", "__notes__"):
        assert getattr(caught.value, name, None) == getattr(error, name, None)


@pytest.mark.slow
def test_an_error_arrives_without_a_solution_that_cannot():
    error = errors.NonFiniteError("reward is not finite", what="reward", rows=1)
    error.solution = sc.solve(lq(reward=lambda x: x[:, 0]), iterations=1, time_steps=K, seed=0, progress=False)
    again = pickle.loads(pickle.dumps(error))
    assert again.solution is None and (again.what, again.rows) == ("reward", 1)
    error.solution = sc.solve(lq(), iterations=1, time_steps=K, seed=0, progress=False)
    again = pickle.loads(pickle.dumps(error))
    assert torch.equal(again.solution.sample(8, seed=1), error.solution.sample(8, seed=1))


def explode(problem):
    return sc.simulate(problem, 8, time_steps=K, seed=0)


def cubic(x, t):
    return 1e6 * x**3


@pytest.mark.slow
def test_a_simulation_that_explodes_in_a_worker_says_so(worker):
    problem = of(sc.SDE(cubic, 1.0, dim=2), initial=sc.Dirac(torch.ones(2)), running_cost=None)
    with pytest.raises(sc.NonFiniteError, match="drift is not finite at step"):
        worker(explode, problem)
