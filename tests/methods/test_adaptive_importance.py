"""A density in few evaluations: what is found, that the number of evaluations binds, and that stopping and going on
changes nothing."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import slow_but
from torch import Tensor
from torch.distributions import HalfCauchy, Normal

import sdecontrol as sc
from sdecontrol.particles.adaptive_importance import SYSTEMS, TURN, AdaptiveSampler, Values, start_law

F64 = torch.float64
TAU = math.log(2 * math.pi)


class Asked:
    """A function of one point that counts its calls."""

    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, 0

    def __call__(self, x: Any) -> Any:
        self.calls += 1
        return self.function(x)


def tilted(x: Any) -> float:
    """N((2, -1), [[1, 0.9], [0.9, 1]]/4) times e^3, of numpy's numbers."""
    d = np.asarray(x, dtype=float) - np.array([2.0, -1.0])
    square = (d @ np.linalg.inv(np.array([[1.0, 0.9], [0.9, 1.0]])) @ d) * 4
    return float(3 - 0.5 * square - TAU - 0.5 * math.log(0.19 / 16))


def scales(x: Tensor) -> Tensor:
    """Standard deviations 1e-3 and 1e3, far from 0; log Z = 0."""
    law = Normal(torch.tensor([0.5, 2000.0], dtype=F64), torch.tensor([1e-3, 1e3], dtype=F64))
    return law.log_prob(x).sum(1)


def nine(x: Tensor) -> Tensor:
    means = torch.cartesian_prod(*[torch.tensor([-5.0, 0.0, 5.0], dtype=x.dtype)] * 2)
    return torch.logsumexp(-0.5 * (x[:, None] - means).square().sum(2) / 0.3, 1) - math.log(9 * 0.3) - TAU


def close(solution: Any, truth: float, most: float) -> None:
    found = solution.evaluate(seed=1).log_z
    assert found.stderr < most and abs(found.value - truth) < 4 * found.stderr, (found, truth)


def test_one_point_at_a_time_within_its_evaluations() -> None:
    """Log Z, moments, and not one call more than was said, whatever is asked of the solution."""
    function = Asked(tilted)
    problem = sc.gibbs_problem(function, 2, vectorised=False)
    solution = sc.solve(problem, sc.AdaptiveImportance(evaluations=3000), seed=0)
    close(solution, 3.0, 0.03)
    x = solution.sample(4000, seed=2)
    assert np.abs(x.mean(0).numpy() - [2.0, -1.0]).max() < 0.06
    assert np.abs(np.cov(x.mT.numpy()) * 4 - [[1.0, 0.9], [0.9, 1.0]]).max() < 0.15
    v, log_w = solution.weighted_sample(5000, seed=3)
    assert v.shape == (5000, 2) and abs(float(log_w.double().exp().mean().log()) - 3) < 0.1
    solution.to_dataframe(100)
    solution.plot_corner(100)
    counted = solution.details["evaluations"]
    assert counted["total"] == 3000 and function.calls <= 3000 and counted["estimate"] > 1200
    assert sum(n for name, n in counted.items() if name != "total") == 3000
    verdict = solution.evaluate(seed=1)
    assert verdict.verdict == "unconfirmed" and "no second estimate" in verdict.reliability
    calls = function.calls
    again = solution.evaluate(seed=1, confirm=20_000)
    assert calls < function.calls <= calls + 21_000 and again.verdict == "confirmed", again.reliability


@pytest.mark.parametrize("shape", slow_but([-0.3, 0.3, 0.6], 0.6))
def test_the_error_is_that_of_independent_groups_whatever_their_tail(shape: float) -> None:
    """Weights of a generalised Pareto law in the place of a run's: over 60 of them log Z is off by its stated error in
    the root mean square. (Errors over 16 systems are not: they are uncertain by a fifth, and where tails are heavy the
    largest weights are mostly missing.)"""
    solution = sc.solve(sc.gibbs_problem(lambda x: -0.5 * x.square().sum(1), 1), sc.AdaptiveImportance(2000), seed=0)
    assert int(solution.draws.unit) == TURN and solution.draws.log_w.shape[1] % TURN == 0
    generator, off = torch.Generator().manual_seed(0), []
    own = solution.draws.log_w
    for _ in range(60):
        u = torch.rand(own.shape, generator=generator, dtype=F64)
        solution.draws = dataclasses.replace(solution.draws, log_w=(((u**-shape) - 1) / shape * (1 - shape)).log())
        solution.__dict__.pop("_tail", None)
        found = solution.evaluate(seed=1).log_z
        off.append(found.value / found.stderr)
    assert 0.75 < float(torch.tensor(off).square().mean().sqrt()) < 1.4, off


@pytest.mark.slow
def test_errors_of_log_z_are_what_they_say_over_seeds() -> None:
    """Beyond two errors: 7 of 80 at most, of 3.6 expected, whose chance is 0.04; densities of one mode, a hole, and a
    hard edge."""

    def half(x: Tensor) -> Tensor:
        return torch.where(x[:, 0] > 0, -0.5 * x.square().sum(1) + math.log(2) - TAU, -math.inf)

    def hole(x: Tensor) -> Tensor:
        return x.square().sum(1).log() - 0.5 * x.square().sum(1) - math.log(2) - TAU

    def skew(x: Tensor) -> Tensor:
        return (x - x.exp()).sum(1)

    far = 0
    for density, dim in ((half, 2), (hole, 2), (skew, 3)):
        for seed in range(27):
            solution = sc.solve(sc.gibbs_problem(density, dim), sc.AdaptiveImportance(2000), seed=seed)
            found = solution.evaluate(seed=1)
            far += abs(found.log_z.value) > 2 * found.log_z.stderr
    assert far <= 7, far


@pytest.mark.slow
def test_modes_far_apart_and_scales_six_orders_apart() -> None:
    close(sc.solve(sc.gibbs_problem(nine, 2, dtype=F64), sc.AdaptiveImportance(5000), seed=0), 0.0, 0.03)
    solution = sc.solve(sc.gibbs_problem(scales, 2), sc.AdaptiveImportance(15_000), seed=0)
    close(solution, 0.0, 0.04)  # 0.004 on five of eight seeds, 0.02 to 0.04 on the others, of which this is one
    x = solution.sample(20_000, seed=1)
    moments = (x - torch.tensor([0.5, 2000.0], dtype=F64)) / torch.tensor([1e-3, 1e3], dtype=F64)
    assert float(moments.mean(0).abs().max()) < 0.06 and float((moments.std(0) - 1).abs().max()) < 0.06


def test_it_begins_with_the_priors_and_never_looks_beyond() -> None:
    """What is asked for first are draws of the priors; later ones are near those that have density."""
    seen = []

    def log_likelihood(v: dict[str, np.ndarray]) -> np.ndarray:
        seen.append(np.stack([v["mu"], v["tau"]], 1))
        return -0.5 * ((1.0 - v["mu"]) / 0.1) ** 2 - 0.5 * ((np.log(v["tau"]) - 0.5) / 0.2) ** 2

    problem = sc.gibbs_problem(
        log_likelihood=log_likelihood, prior={"mu": Normal(0.0, 2.0), "tau": HalfCauchy(1.0)}, arrays="numpy"
    )
    solution = sc.solve(problem, sc.AdaptiveImportance(4000), seed=0)
    mu = Normal(0.0, math.hypot(2.0, 0.1)).log_prob(torch.tensor(1.0)) + 0.5 * TAU + math.log(0.1)
    log_tau = torch.linspace(-3, 4, 20_001, dtype=F64)
    inner = HalfCauchy(1.0).log_prob(log_tau.exp()) + log_tau - 0.5 * ((log_tau - 0.5) / 0.2).square()
    close(solution, float(mu + torch.trapezoid(inner.exp(), log_tau).log()), 0.03)
    first = seen[2]  # after two of the probe
    assert abs(first[:, 0].std() - 2) < 0.8 and abs(np.median(first[:, 1]) - 1) < 0.7
    assert np.abs(np.concatenate(seen[2:])[:, 0]).max() < 12
    assert set(solution.sample(10, seed=0)) == {"mu", "tau"}


@pytest.mark.slow
def test_mean_of_z_hat_is_z() -> None:
    """Over 40 runs of 1200 evaluations on a density with heavier tails than its fit: within 4 standard errors of 1."""

    def student(x: Tensor) -> Tensor:
        return torch.distributions.StudentT(5.0).log_prob(x).sum(1)

    problem = sc.gibbs_problem(student, 2, dtype=F64)
    found = []
    for seed in range(40):
        draws = sc.solve(problem, sc.AdaptiveImportance(1200), seed=seed).draws
        found.append(float(draws.log_w.exp().mean()))
    z = np.array(found)
    assert abs(z.mean() - 1) < 4 * z.std() / len(z) ** 0.5 < 0.06, (z.mean(), z.std())


def test_weights_are_those_of_the_law_that_was_drawn_from() -> None:
    """Of the estimate: the density of the law and its wide parts, in the shares in which rows were drawn."""
    values = Values(
        lambda x: -0.5 * x.square().sum(1), torch.zeros(4000, dtype=F64), torch.zeros((), dtype=int), 10_000
    )
    sampler = AdaptiveSampler(start_law(torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)), values, 4000, 0, 4)
    while not sampler.done:
        sampler.step()
    x, log_w, final = sampler.weighted()
    assert final and len(x) % (TURN * SYSTEMS) == 0
    law: Any = sampler.law
    parts = [(9 / 12, 1.0), (2 / 12, 4.0), (1 / 12, 16.0)]
    q = sum(share * law.widened(factor).log_prob(x).exp() for share, factor in parts)
    torch.testing.assert_close(log_w, -0.5 * x.square().sum(1) - q.log())
    wide = torch.arange(len(x)) % TURN == 3
    assert float(x[wide].std()) > 3 * float(x[torch.arange(len(x)) % TURN == 1].std())


@pytest.mark.slow
def test_stopped_anywhere_it_gives_what_there_is_and_goes_on_to_the_same(tmp_path: Any) -> None:
    """Ctrl-C in the midst of a batch: a solution with a verdict; resumed, the numbers of a run that was never stopped,
    and no value is asked for twice."""
    method = sc.AdaptiveImportance(2500)
    whole = sc.solve(sc.gibbs_problem(tilted, 2, vectorised=False), method, seed=4)

    class Interrupted(Asked):
        last = 1700

        def __call__(self, x: Any) -> Any:
            if self.calls == self.last:
                self.last = -1
                raise KeyboardInterrupt
            return super().__call__(x)

    function = Interrupted(tilted)
    problem = sc.gibbs_problem(function, 2, vectorised=False)
    with pytest.warns(UserWarning, match="adaptive-importance was interrupted after"):
        there = sc.solve(problem, method, seed=4, checkpoint_dir=tmp_path)
    assert there.details["interrupted"] and not there.reproducible
    found = there.evaluate(seed=1)
    assert abs(found.log_z.value - 3) < 5 * found.log_z.stderr < 0.5
    calls = function.calls
    resumed = sc.solve(problem, method, seed=4, checkpoint_dir=tmp_path, resume=True)
    assert torch.equal(resumed.draws.log_w, whole.draws.log_w) and torch.equal(resumed.draws.x, whole.draws.x)
    assert function.calls - calls <= 2500 - 1700 + 40  # those of the batch that was begun, and the fingerprint's
    assert resumed.history == whole.history or repr(resumed.history) == repr(whole.history)


def test_an_early_end_is_unreliable() -> None:
    solution = sc.solve(sc.gibbs_problem(nine, 2, dtype=F64), sc.AdaptiveImportance(5000), iterations=3, seed=0)
    assert solution.evaluate(seed=0).verdict == "unreliable"
    assert "before the estimate began" in solution.evaluate(seed=0).reliability


def test_a_missed_mode_that_the_search_has_seen_is_told() -> None:
    """The draws of the search say that there is more than those of the estimate do."""
    solution = sc.solve(sc.gibbs_problem(nine, 2, dtype=F64), sc.AdaptiveImportance(5000), seed=0)
    draws = solution.draws
    assert solution.evaluate(seed=0).verdict == "unconfirmed"
    assert abs(float(draws.other[0])) < 4 * float(draws.other[1]) < 0.5
    solution.draws = dataclasses.replace(draws, log_w=draws.log_w - 1.0)  # a part of the target is missing
    judged = solution.evaluate(seed=0)
    assert judged.verdict == "unreliable" and "draws of the search find more" in judged.reliability


def test_too_few_evaluations_and_other_problems_are_refused_with_the_number() -> None:
    problem = sc.gibbs_problem(tilted, 2, vectorised=False)
    with pytest.raises(ValueError, match=r"evaluations=400 are too few: adaptive-importance needs 506 in 2 dimensions"):
        sc.solve(problem, sc.AdaptiveImportance(400))
    with pytest.raises(ValueError, match="evaluations=400 are too few"):
        sc.solve(problem, sc.Auto(evaluations=400))
    with pytest.raises(ValueError, match="is for gibbs_problem"):
        sc.solve(
            sc.ControlProblem(sc.LinearSDE(-torch.eye(2), torch.eye(2)), sc.Dirac(torch.zeros(2))),
            sc.AdaptiveImportance(),
        )
    conditional = sc.gibbs_problem(lambda x, y: -(x - y).square().sum(1), 1, condition=torch.zeros(5, 1))
    with pytest.raises(ValueError, match="make a problem with the condition fixed"):
        sc.solve(conditional, sc.AdaptiveImportance())
    with pytest.raises(sc.NonFiniteError, match=r"log_density is NaN or .inf in \d+ of .* return -inf"):
        sc.solve(sc.gibbs_problem(lambda x: x.log().sum(1) - x.sum(1), 2, dtype=F64), sc.AdaptiveImportance(1000))
    with pytest.raises(sc.NonFiniteError, match="log_density is -inf at all"):
        sc.solve(sc.gibbs_problem(lambda x: x.sum(1) - math.inf, 2, dtype=F64), sc.AdaptiveImportance(1000))


@pytest.mark.slow
def test_a_constant_of_ten_million_changes_nothing() -> None:
    method = sc.AdaptiveImportance(2000)
    plain, moved = (
        sc.solve(sc.gibbs_problem(lambda x, c=c: tilted(x) + c, 2, vectorised=False), method, seed=1)
        for c in (0.0, 1e7)
    )
    one, other = (s.evaluate(seed=0).log_z for s in (plain, moved))
    assert abs(other.value - 1e7 - one.value) < 1e-6 and torch.allclose(plain.draws.x, moved.draws.x, atol=1e-5)
