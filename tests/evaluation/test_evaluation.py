"""Estimates, gaps and reliability against closed forms, and the sampling metrics."""

import math

import pytest
import torch
from cases import F64, randn, random_lq

import sdecontrol as sc
from sdecontrol.controls.given import given_control
from sdecontrol.evaluation.estimates import (
    effective_sample_size,
    jackknife,
    log_mean_weight,
    mean_estimate,
    pareto_k,
    weighted_mean,
)
from sdecontrol.evaluation.evaluate import evaluate
from sdecontrol.evaluation.solution import Solution


def off_by(estimate, value):
    return abs(estimate.value - value) / max(estimate.stderr, 1e-300)


class Exactly(torch.nn.Module):
    """A fixed affine control, far from optimal, whose objective has a closed form on the chain."""

    def __init__(self, gain, shift):
        super().__init__()
        self.gain, self.shift = gain, shift

    def forward(self, x, t):
        return x @ self.gain.mT + self.shift


def chain_objective(problem, control, steps):
    """E[R], KL of an affine control by the Gaussian moments of its chain, in plain linear algebra."""
    A, a, root = (torch.from_numpy(c) for c in problem.reference.coefficients(0.0))
    h, (mean, cov) = 1 / steps, (problem.initial.mean, problem.initial.covariance_matrix)
    kl = cost = 0.0
    for _ in range(steps):
        u_mean, u_cov = control.gain @ mean + control.shift, control.gain @ cov @ control.gain.mT
        kl += h / 2 * float(u_mean @ u_mean + u_cov.trace())
        F = problem.running_cost_function.F_at(0.0)
        cost += h / 2 * float(mean @ F @ mean + (F @ cov).trace())
        M = torch.eye(len(mean), dtype=F64) + h * (A + root @ control.gain)
        mean, cov = M @ mean + h * (a + root @ control.shift), M @ cov @ M.mT + h * root @ root.mT
    r = problem.reward_function
    reward = float(r.g @ mean - (mean @ r.G @ mean + (r.G @ cov).trace()) / 2)
    return reward, cost, kl


@pytest.mark.parametrize("start", ["dirac", "fixed"])
def test_evaluate_against_closed_forms_for_a_suboptimal_control(start):
    problem = random_lq(2, seed=3, start=start)
    control = Exactly(0.3 * randn(2, 2, seed=1), 0.3 * randn(2, seed=2))
    steps = 10
    exact = sc.exact_solution(problem, time_steps=steps)
    reward, cost, kl = chain_objective(problem, control, steps)
    ev = evaluate(problem, control, problem.chain(steps), 40_000, 5, known=exact.known_values())
    assert off_by(ev.reward, reward) < 4 and off_by(ev.running_cost, cost) < 4 and off_by(ev.kl, kl) < 4
    objective = reward - cost - problem.alpha * kl
    assert off_by(ev.objective, objective) < 4 and off_by(ev.elbo, objective / problem.alpha) < 4
    assert off_by(ev.log_z, float(exact.log_z)) < 4
    top = float(exact.start_log_z)
    assert ev.exact and off_by(ev.gap, top - objective / problem.alpha) < 4
    assert ev.start_gap.value == pytest.approx(float(exact.log_z) - top, abs=1e-9)


@pytest.mark.parametrize("start", ["dirac", "fixed"])
def test_the_gap_is_estimated_where_no_exact_solution_is_given(start):
    problem = random_lq(2, seed=3, start=start)
    steps = 10
    exact = sc.exact_solution(problem, time_steps=steps)
    near = lambda x, t: 0.9 * exact.control(x, t)  # noqa: E731
    known = evaluate(problem, near, problem.chain(steps), 20_000, 5, known=exact.known_values())
    blind = evaluate(problem, near, problem.chain(steps), 20_000, 6)
    assert known.exact and not blind.exact and blind.reliable
    assert abs(known.gap.value - blind.gap.value) < 4 * math.hypot(known.gap.stderr, blind.gap.stderr)
    if start == "fixed":
        assert off_by(blind.start_gap, float(exact.log_z) - float(exact.start_log_z)) < 4
        far = evaluate(
            problem, Exactly(0.3 * randn(2, 2, seed=1), 0.3 * randn(2, seed=2)), problem.chain(steps), 8192, 6
        )
        assert not far.reliable


def test_at_the_optimum_the_gap_is_the_floor_of_mean_shift_chains():
    for start in ("dirac", "controlled", "fixed"):
        problem = random_lq(2, seed=3, start=start)
        exact = sc.exact_solution(problem, time_steps=10)
        ev = exact.evaluate(20_000, seed=1)
        assert off_by(ev.gap, float(exact.floor)) < 4


def test_a_collapsed_control_is_called_unreliable():
    """Two equal modes, a control that visits one of them: the gap estimate alone cannot see it, the reference's paths
    can."""
    problem = sc.ControlProblem(
        sc.BrownianMotion(1, horizon=1.0), initial=sc.Dirac(torch.zeros(1)),
        reward=lambda x: torch.logaddexp(-8 * (x[:, 0] - 1) ** 2, -8 * (x[:, 0] + 1) ** 2),
    )  # fmt: skip
    one_mode = lambda x, t: (1 - x) / (1 - 0.94 * t[:, None])  # noqa: E731
    ev = evaluate(problem, one_mode, problem.chain(200), 4096, 0)
    assert ev.gap.value < 0.2 and ev.ess.value > 0.5  # it looks good
    assert ev.verdict == "unreliable" and "a mode may be missing" in ev.reliability
    assert "estimated" in str(ev)


def test_heavy_tailed_weights_are_called_unreliable():
    problem = sc.ControlProblem(sc.BrownianMotion(1), initial=sc.Dirac(torch.zeros(1)), reward=lambda x: 8 * x[:, 0])
    ev = evaluate(problem, lambda x, t: -4 * torch.ones_like(x), problem.chain(10), 4096, 0)
    assert ev.verdict == "unreliable" and ("Pareto" in ev.reliability or "effective" in ev.reliability)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_pareto_k_finds_the_tail(k):
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(1), dtype=F64)
    assert pareto_k(-k * u.log()) == pytest.approx(k, abs=0.12)
    assert pareto_k(torch.zeros(1000)) == 0.0


def test_weight_estimates():
    log_w = torch.log(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64)) + 1000
    assert log_mean_weight(log_w).value == pytest.approx(1000 + math.log(2.5))
    assert effective_sample_size(log_w) == pytest.approx(100 / 30 / 4)
    assert mean_estimate(torch.tensor([1.0, 3.0])).stderr == pytest.approx(1.0)


@pytest.mark.parametrize("grid", [10, [0.0, 0.05, 0.3, 0.4, 0.75, 1.0]], ids=["even", "uneven"])
def test_control_error_of_a_control_with_a_known_error(grid):
    """Off by a constant: its square, whatever the grid, since it is an integral over time. Off by a factor of 1.3: 0.09
    of the optimal control's own size, path by path."""
    problem = random_lq(2, m=3, seed=3)
    exact = sc.exact_solution(problem, time_steps=grid)
    offset = torch.tensor([0.1, -0.2, 0.3], dtype=F64)

    def error(control):
        settings = {"time_steps": grid, "scheme": None}
        solution = Solution(problem, given_control(problem, control), method="given", settings=settings)
        return sc.control_error(solution, exact, n=256)

    off = error(lambda x, t: exact.control(x, t) + offset)
    assert off.absolute.value == pytest.approx(0.14, rel=1e-9) and off.absolute.stderr < 1e-12
    assert off.relative.stderr > 1e-4  # the size of u* differs from path to path
    for factor in (1.3, 0.0):
        relative = error(lambda x, t, factor=factor: factor * exact.control(x, t)).relative
        assert relative.value == pytest.approx((factor - 1) ** 2, rel=1e-9) and relative.stderr < 1e-9
    assert error(exact.control).absolute.value < 1e-25


def test_solution_weights_are_those_of_its_paths_and_unbiased():
    problem = random_lq(2, seed=3)
    solution = sc.solve(problem, "reward-backprop", time_steps=6, iterations=20, seed=0, batch_size=64)
    exact = sc.exact_solution(problem, like=solution)
    x, log_w = solution.weighted_sample(50_000, seed=1)
    w = log_w.exp()
    assert x.shape == (50_000, 2) and off_by(mean_estimate(w), float(exact.log_z.exp())) < 4
    law = exact.marginal(1.0)
    for j in range(2):  # self-normalised weighted moments are those of the exact terminal law
        weighted = (w * (x[:, j] - law.mean[j])) / w.mean()
        assert off_by(mean_estimate(weighted), 0.0) < 4
        weighted = (w * ((x[:, j] - law.mean[j]) ** 2 - law.variance[j])) / w.mean()
        assert off_by(mean_estimate(weighted), 0.0) < 4


def test_distances_between_samples():
    a, b = randn(400, 2, seed=1), randn(400, 2, seed=2) + torch.tensor([3.0, 0.0], dtype=F64)
    assert sc.metrics.wasserstein(a, a + 1.0) == pytest.approx(math.sqrt(2.0), rel=1e-9)
    assert sc.metrics.wasserstein(a, b) == pytest.approx(3.0, abs=0.25)
    assert sc.metrics.sliced_wasserstein(a, a) == pytest.approx(0.0, abs=1e-12)
    both = torch.cat((a, b))
    only_a = torch.cat((torch.zeros(400), torch.full((400,), -60.0)))
    assert sc.metrics.sliced_wasserstein(both, a, log_weights_a=only_a) == pytest.approx(0.0, abs=1e-9)


def test_an_evaluation_prints_as_a_table_with_errors():
    ev = sc.exact_solution(random_lq(2, seed=3), time_steps=5).evaluate(128, seed=0)
    text = str(ev)
    for word in ("reward", "KL", "objective", "ELBO", "log Z", "ESS", "gap", "verdict", "±"):
        assert word in text
    assert ev.as_dict()["gap"]["value"] == ev.gap.value


def test_what_is_printed():
    """Two digits of the error, powers of ten where zeros would say nothing, and no line for what particles do not
    have."""
    from sdecontrol.evaluation.estimates import Estimate

    assert str(Estimate(1.23456, 0.0123)) == "1.235 ± 0.012" and str(Estimate(2.0, 0.0)) == "2 (exact)"
    assert str(Estimate(1.2e-56, 3e-57)) == "1.2e-56 ± 3e-57"
    problem = sc.gibbs_problem(lambda x: -0.5 * x.square().sum(1), 1, scale=1.0)
    particles = str(sc.solve(problem, sc.TemperedSMC(64), seed=0).evaluate(128, seed=1))
    assert "nan" not in particles and "KL(" not in particles and "ELBO" in particles


@pytest.mark.parametrize("start, spread", [("fixed", 1.0), ("controlled", 2.0)])
def test_with_conditions_the_gap_is_that_of_every_condition(start, spread):
    """Not of the mixture over conditions, whose log Z no control reaches: the optimum has next to none, another control
    what it lacks on average. The path ends in N(0, spread), and is drawn towards a y of its own."""
    point = sc.Dirac(torch.zeros(1, dtype=F64))
    problem = sc.ControlProblem(
        sc.LinearSDE(torch.zeros(1, 1, dtype=F64), torch.eye(1, dtype=F64)),
        point if start == "fixed" else sc.Gaussian(torch.zeros(1, dtype=F64), torch.eye(1, dtype=F64)),
        reward=lambda x, y: -(x - y).square().sum(1),
        condition=sc.Gaussian(torch.zeros(1, dtype=F64), 4 * torch.eye(1, dtype=F64)),
        start=start,
    )
    chain = problem.chain(20)
    best = lambda x, t, y: -2 * (x - y) / (1 + 2 * (1 - t.unsqueeze(1)))  # noqa: E731
    found = evaluate(problem, best, chain, n=2048, seed=3)
    if start == "fixed":  # else a control of the process says nothing of the learned start
        # what no shift of the mean can do: the optimum's steps are narrower
        bent = [2 / (1 + 2 * (1 - t)) / 20 for t in chain.clock[1:]]
        assert off_by(found.gap, sum(0.5 * (b - math.log1p(b)) for b in bent)) < 4
    size = 1 + 2 * spread
    assert off_by(found.start_gap, 4 / size - 0.5 * math.log(1 + 8 / size)) < 4  # log E Z(y) - E log Z(y)
    nothing = evaluate(problem, lambda x, t, y: torch.zeros_like(x), chain, n=8192, seed=4)
    want = spread + 4 - 0.5 * math.log(size) - 4 / size  # -E R - (-E log Z(y))
    assert off_by(nothing.gap, want) < 4, (nothing.gap, want)


def test_a_weighted_mean_has_the_error_of_its_ratio():
    """Of ``sum w v / sum w`` with two weights in closed form; of equal weights that of a mean, but for n - 1."""
    found = weighted_mean(torch.tensor([1.0, 3.0]), torch.tensor([0.0, math.log(3.0)]))
    assert found.value == pytest.approx(2.5) and found.stderr == pytest.approx(math.hypot(0.25 * 1.5, 0.75 * 0.5))
    values = randn(100, seed=1)
    equal = weighted_mean(values, torch.full((100,), 7.0))
    assert equal.stderr == pytest.approx(mean_estimate(values).stderr * math.sqrt(99 / 100))


def test_the_jackknife_of_a_mean_is_its_standard_error_over_groups():
    """Of a difference of means of two samples too, of which the same groups are left out; the last rows are in no
    group."""
    a, b = randn(16 * 5 + 3, seed=1), randn(16 * 5 + 3, seed=2) ** 3
    groups = [v[:80].reshape(16, 5).mean(1) for v in (a, b)]
    one, two = jackknife(lambda v: float(v.mean()), a), jackknife(lambda v, w: float(v.mean() - w.mean()), a, b)
    assert one.value == float(a.mean()) and one.stderr == pytest.approx(float(groups[0].std()) / 4, rel=1e-12)
    assert two.stderr == pytest.approx(float((groups[0] - groups[1]).std()) / 4, rel=1e-12)
