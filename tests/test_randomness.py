"""Every random number is a function of a seed and a named place; no two purposes share one."""

import ast
import itertools
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rooms import MODULES

import sdecontrol as sc
from sdecontrol import randomness
from sdecontrol.randomness import Place, SeededNoise, derive_seed, fresh_seed, generator_for, global_rng

# ---------------------------------------------------------------- the encoding


def test_no_two_seeds_places_and_indices_give_one_seed() -> None:
    """About 240 000 of them, with zeros and words of both halves of 64 bits; by chance two of them would agree with
    probability 3e-9."""
    seeds = (0, 1, 5, 7, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**63, 2**64 - 1)
    indices = [i for length in range(4) for i in itertools.product((0, 1, 2, 41, 2**32), repeat=length)]
    family = [derive_seed(s, place, *i) for s in seeds for place in Place for i in indices]
    assert len(set(family)) == len(family) > 200_000
    assert all(0 <= s < 2**63 for s in family)


def test_an_index_of_zero_is_not_no_index() -> None:
    assert derive_seed(5, Place.OUTSIDE, 1) != derive_seed(5, Place.OUTSIDE, 1, 0)
    assert derive_seed(5, Place.OUTSIDE) != derive_seed(5, Place.OUTSIDE, 0) != derive_seed(5, Place.OUTSIDE, 0, 0)


def test_the_noise_of_a_block_is_no_other_places() -> None:
    paths = SeededNoise(7, 42 * 64, 1, (1,), dtype=torch.float64, device="cpu")
    last = set(paths[0][-64:].flatten().tolist())
    for index in ((41,), (41, 0)):
        for place in set(Place) - {Place.NOISE}:
            other = torch.randn(64, generator=generator_for("cpu", 7, place, *index), dtype=torch.float64)
            assert not last & set(other.tolist())
    again = torch.randn(64, generator=generator_for("cpu", 7, Place.NOISE, 41, 0), dtype=torch.float64)
    assert last == set(again.tolist())


def test_first_numbers_of_all_places_differ() -> None:
    """On the CPU generators have 32 bits of seed: by chance two of 155 agree with probability 3e-6."""
    first = [float(torch.rand((), generator=generator_for("cpu", 0, place), dtype=torch.float64)) for place in Place]
    assert len(set(first)) == len(first)
    for place in (Place.LAW, Place.START):
        with global_rng("cpu", 0, place):
            assert float(torch.rand((), dtype=torch.float64)) == first[list(Place).index(place)]


@pytest.mark.parametrize("place", [3, 0, True, "noise", None])
def test_a_place_must_be_one(place: Any) -> None:
    with pytest.raises(TypeError, match=r"place must be a Place.*Place\.OUTSIDE"):
        derive_seed(0, place)
    with pytest.raises(TypeError, match="place must be a Place"):
        generator_for("cpu", 0, place, 1)
    with pytest.raises(TypeError, match="place"):
        generator_for("cpu", 0)  # type: ignore[call-arg]


@pytest.mark.parametrize("index", [-1, 2**64, 0.5])
def test_an_index_that_does_not_fit_is_an_error(index: Any) -> None:
    with pytest.raises(Exception, match=r"argument|integer"):
        derive_seed(0, Place.OUTSIDE, index)


def test_seeds_of_64_bits_are_taken_and_others_refused() -> None:
    assert fresh_seed(2**64 - 1) == 2**64 - 1 and fresh_seed(np.int64(3)) == 3  # type: ignore[arg-type]
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="from 0 to 2\\^64 - 1"):
            fresh_seed(seed)
    for wrong in (True, 1.0, "0"):
        with pytest.raises(TypeError, match="seed must be an int or None"):
            fresh_seed(wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------- the call sites


def _call_sites() -> Iterator[tuple[str, ast.Call]]:
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if name != "randomness" and isinstance(node, ast.Call):
                yield name, node


def test_generators_are_made_in_one_file() -> None:
    """Only ``randomness.py`` makes or seeds them, or touches the global ones of torch, numpy and Python."""
    wrong = []
    for name, node in _call_sites():
        called = ast.unparse(node.func)
        if called.startswith(("torch.Generator", "torch.random", "np.random", "numpy.random")) or (
            called.endswith(("manual_seed", "set_rng_state", "default_rng", "SeedSequence", "RandomState"))
        ):
            wrong.append(f"{name}:{node.lineno} {called}")
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = "" if isinstance(node, ast.Import) or node.level else f"{node.module}."
                names = {module + alias.name for alias in node.names}
                foreign = ("random", "random.", "numpy.random", "torch.random", "torch.Generator")
                wrong += [f"{name}:{node.lineno} {found}" for found in names if found.startswith(foreign)]
    assert not wrong, wrong


def test_the_raw_generator_is_for_published_definitions_alone() -> None:
    callers = {name for name, node in _call_sites() if ast.unparse(node.func) == "published_generator"}
    # and for the states at which files of schema 2 have their numbers
    assert callers == {"library.inverse", "library.problems", "library.targets", "problems.problem"}


def test_every_place_is_written_at_one_call_and_by_its_name() -> None:
    """One call per place: no two purposes can share one. ``Place.OUTSIDE`` is for code outside of the package."""
    written: dict[str, list[str]] = defaultdict(list)
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "Place":
                written[node.attr].append(f"{name}:{node.lineno}")
            assert not (isinstance(node, ast.Call) and ast.unparse(node.func) == "Place"), f"{name}: made from a number"
    named = {place.name for place in Place} - {"OUTSIDE"}
    assert set(written) == named, set(written) ^ named
    several = {place: where for place, where in written.items() if len(where) > 1}
    assert not several, several


# ---------------------------------------------------------------- what verbs draw


class Recorder:
    """The generators that are made, verb by verb: their seeds, places, and where."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.drawn: dict[str, list[tuple[int, Place, tuple[int, ...]]]] = defaultdict(list)
        self._verb: str | None = None
        plain = randomness.derive_seed

        def recorded(seed: int, place: Place, *index: int) -> int:
            found = plain(seed, place, *index)
            # other modules have derive_seed by its name: in this one it makes generators alone
            assert sys._getframe(1).f_code.co_name in ("generator_for", "global_rng")
            if self._verb is not None:
                self.drawn[self._verb].append((found, place, index))
            return found

        patch.setattr(randomness, "derive_seed", recorded)

    @contextmanager
    def verb(self, name: str) -> Iterator[None]:
        self._verb = name
        yield
        self._verb = None

    def seeds(self, verb: str) -> set[int]:
        return {seed for seed, *_ in self.drawn[verb]}


def _record(recorder: Recorder, problem: Any, method: Any, seed: int, certify: bool, **options: Any) -> None:
    with recorder.verb("solve"):
        solution = sc.solve(problem, method, seed=seed, progress=False, **options)
    with recorder.verb("evaluate"):
        solution.evaluate(128, seed=seed)
    with recorder.verb("sample"):
        solution.sample(128, seed=seed)
    with recorder.verb("weighted_sample"):
        solution.weighted_sample(128, seed=seed)
    if certify:
        with recorder.verb("certify"):
            sc.certify(solution, n=128, seed=seed)


def _control_problem() -> sc.ControlProblem:
    start = sc.Gaussian(torch.zeros(2), torch.eye(2))
    return sc.ControlProblem(sc.LinearSDE(-torch.eye(2), 1.0), start, reward=lambda x: -x.square().sum(1))


def _two_modes(x: torch.Tensor) -> torch.Tensor:
    return torch.logaddexp(-(x - 1.5).square().sum(1), -(x + 1.5).square().sum(1))


CONTROLLED = {
    "log-variance": (sc.LogVariance(), {"iterations": 2}),
    "path-consistency": (sc.PathConsistency(replay=2), {"iterations": 2}),
    "soft-ppo": (sc.SoftPPO(), {"iterations": 2}),
    "particle-matching": (sc.ParticleMatching(256, 2), {"iterations": 3}),
    "smc": (sc.SMC(64), {}),
    "best-of-n": (sc.BestOfN(4), {}),
}
SAMPLED = {
    "auto": (sc.Auto(256), {"iterations": 2}),
    "tempered-smc": (sc.TemperedSMC(128), {}),
    "smc": (sc.SMC(64), {}),
    "mala": (sc.MALA(num_chains=16, warm_up=60), {}),
}


@pytest.mark.parametrize(("kind", "name"), [*(("control", n) for n in CONTROLLED), *(("gibbs", n) for n in SAMPLED)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_learned_and_what_judges_it_share_no_draw(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One seed for all verbs: a pilot run, a training (with its ladder or warm-up) and each evaluation make different
    generators (but for the states that functions are tried with, always the same ones), and none of these verbs makes
    a generator twice."""
    seed, recorder = 0, Recorder(monkeypatch)
    if kind == "control":
        method, options = CONTROLLED[name]
        _record(recorder, _control_problem(), method, seed, True, time_steps=4, batch_size=64, **options)
    else:
        method, options = SAMPLED[name]
        with recorder.verb("gibbs_problem"):
            problem = sc.gibbs_problem(_two_modes, 2, seed=seed)
        _record(recorder, problem, method, seed, name == "auto", time_steps=4, **options)
    before = [verb for verb in ("gibbs_problem", "solve") if verb in recorder.drawn]
    after = [verb for verb in recorder.drawn if verb not in before]
    assert set(after) >= {"evaluate", "sample", "weighted_sample"}
    for early, late in [*itertools.combinations(before, 2), *itertools.product(before, after)]:
        shared = recorder.seeds(early) & recorder.seeds(late)
        places = {place for found, place, _ in recorder.drawn[late] if found in shared}
        assert places <= {Place.PROBE_STATES, Place.DIFFUSION_ENTRIES}, (early, late, places)
    for verb, drawn in recorder.drawn.items():
        again = {place for (_, place, _), count in Counter(drawn).items() if count > 1}
        assert not again, (verb, again)


def test_paths_of_one_seed_are_the_same_for_every_verb_of_a_control() -> None:
    """What is promised to be shared: sample, weighted_sample, evaluate and certify look at the paths that simulate
    gives for their seed."""
    problem = _control_problem()
    solution = sc.solve(problem, sc.LogVariance(), iterations=2, time_steps=4, batch_size=64, seed=0, progress=False)
    paths = solution.simulate(128, seed=0)
    assert torch.equal(paths.end, sc.simulate(problem, 128, control=solution.control, time_steps=4, seed=0).end)
    assert torch.equal(paths.samples, solution.sample(128, seed=0))
    x, log_w = solution.weighted_sample(128, seed=0)
    assert torch.equal(paths.samples, x) and torch.allclose(log_w, paths.log_weights(), rtol=1e-5)
    mean = float(paths.log_weights(dtype=torch.float64).mean())
    assert solution.evaluate(128, seed=0).elbo.value == pytest.approx(mean, rel=1e-6)
    assert sc.certify(solution, n=128, seed=0).elbo.value == pytest.approx(mean, rel=1e-6)


def test_call_sites_in_benchmarks_and_tests_name_a_place() -> None:
    """Outside of the package an index after ``Place.OUTSIDE`` tells draws apart."""
    root = Path(__file__).parent.parent
    for path in [*root.glob("benchmarks/**/*.py"), *root.glob("tests/**/*.py"), *root.glob("theory_checks/**/*.py")]:
        if path == Path(__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "derive_seed":
                assert ast.unparse(node.args[1]) == "Place.OUTSIDE" and len(node.args) > 2, f"{path}:{node.lineno}"
