"""Exact solutions of linear-quadratic chains, against the dense Gaussian of the whole path and against quadrature."""

import itertools

import numpy as np
import pytest
import torch
from cases import F64, randn, spd
from dense_gaussian import DensePath, feedback_of, gaussian_tilt, linear_quadratic

import sdecontrol as sc
from sdecontrol.chains.shifts import shift_function, shifts_along
from sdecontrol.evaluation.evaluate import log_weights

close = lambda a, b, tol=1e-10: torch.testing.assert_close(a, b, rtol=tol, atol=tol)  # noqa: E731

CASES = [  # noises m, start, running cost, time-dependent, scheme
    *itertools.product((2, 3, 4), ("dirac", "fixed", "controlled"), (True,), (False,), ("euler", "exact")),
    (2, "controlled", True, True, "euler"),
    (4, "fixed", True, True, "exact"),
    (3, "controlled", False, True, "exact"),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda c: "-".join(map(str, c)))
def case(request):
    return solved(*request.param)


def solved(m, start, running, varying, scheme):
    problem = linear_quadratic(3, m, seed=10 * m, start=start, running=running, varying=varying)
    return problem, sc.exact_solution(problem, 6, scheme=scheme), DensePath(problem, 6, scheme), scheme


def test_log_z_is_that_of_the_whole_path(case):
    _, exact, dense, _ = case
    close(exact.log_z, dense.log_z)


def test_marginals_are_those_of_the_tilted_path(case):
    _, exact, dense, _ = case
    for k, t in enumerate(exact.chain.clock):
        mean, cov = dense.marginal(k)
        close(exact.marginal(t).mean, mean)
        close(exact.marginal(t).covariance_matrix, cov)


def test_kernels_and_bridges_are_conditionals_of_the_tilted_path(case):
    _, exact, dense, _ = case
    clock, K = exact.chain.clock, dense.K
    for k in range(1, K):
        x = dense.marginal(k)[0] + (randn(4, dense.N.shape[1], seed=k) @ dense.N[3 * k : 3 * k + 3].mT)
        mean, cov = dense.conditional(k + 1, k, x)
        close(exact.kernel(x, k).mean, mean, 1e-9)
        close(exact.kernel(x, k).covariance_matrix, cov.expand(4, 3, 3), 1e-9)
        for j in {0, k - 1, k // 2} - {k}:
            mean, cov = dense.conditional(j, k, x)
            law = exact.bridge(clock[j], clock[k], x)
            close(law.mean, mean, 1e-9)
            close(law.covariance_matrix, cov.expand(4, 3, 3), 1e-9)


def test_value_is_the_log_z_of_the_chain_that_starts_there(case):
    problem, exact, _, scheme = case
    for x in randn(2, 3, seed=1):
        there = sc.ControlProblem(
            problem.reference, sc.Dirac(x), problem.reward_function, problem.running_cost_function, alpha=problem.alpha
        )
        close(exact.value(x[None], 0.0)[0] / problem.alpha, DensePath(there, 6, scheme).log_z)


def test_start_log_z_is_the_mean_of_the_values_at_the_start(case):
    problem, exact, _, _ = case
    if problem.start == "controlled" or isinstance(problem.initial, sc.Dirac):
        close(exact.start_log_z, exact.log_z)
        return
    x, w = np.polynomial.hermite_e.hermegauss(3)  # exact for a quadratic
    nodes = torch.tensor(list(itertools.product(x, repeat=3)))
    weights = torch.tensor([np.prod(p) for p in itertools.product(w / w.sum(), repeat=3)])
    values = exact.value(problem.initial.mean + problem.initial.shape_noise(nodes), 0.0)
    close(exact.start_log_z, (weights * values).sum() / problem.alpha)
    assert exact.start_log_z < exact.log_z


def test_no_other_control_has_a_larger_elbo(case):
    problem, exact, _, scheme = case
    feedback = feedback_of(exact)
    best = DensePath(problem, 6, scheme, feedback).elbo()
    close(exact.elbo, best)
    close(exact.floor, exact.start_log_z - exact.elbo)
    assert exact.floor > 0
    for seed in range(4):
        step = [(1e-3 * randn(*g.shape, seed=seed), 1e-3 * randn(*o.shape, seed=seed + 50)) for g, o in feedback]
        sides = []
        for sign in (1, -1):
            moved = [(g + sign * dg, o + sign * do) for (g, o), (dg, do) in zip(feedback, step)]
            sides.append(DensePath(problem, 6, scheme, moved).elbo())
        assert max(sides) < best  # a strict maximum, and stationary: the slope is far below the curvature
        curvature = 2 * best - sum(sides)
        assert abs(sides[0] - sides[1]) < 0.05 * curvature


def test_the_best_mean_shift_is_the_mean_of_p_star_under_euler(case):
    _, exact, _, scheme = case
    x = randn(4, 3, seed=3)
    for k, t in enumerate(exact.chain.clock[:-1]):
        u = exact.control(x, t)
        if k >= exact.chain.start and u.shape[1] > 3 and scheme == "exact":
            effect = exact.chain.gain(k)
            close(u, (torch.linalg.pinv(effect) @ effect @ u.mT).mT)
        if scheme == "euler":
            mean, scale = exact.chain.kernel(k, x)
            moved = mean + (exact.chain.shift_at(k, x, u).unsqueeze(1) @ scale.mT).squeeze(1)
            close(moved, exact.kernel(x, k).mean)


def test_shifts_on_the_chain_are_those_of_the_control(case):
    _, exact, _, _ = case
    chain = exact.chain
    states = randn(chain.steps, 5, 3, seed=4)
    whole = shifts_along(chain, exact.control, states)
    function = shift_function(chain, exact.control)
    for k in range(chain.steps):
        want = chain.shift_at(k, states[k], exact.control(states[k], chain.clock[k]))
        close(function(k, states[k], None), want)
        close(whole[k], want)


@pytest.mark.parametrize("m, scheme", list(itertools.product((3, 4), ("euler", "exact"))))
def test_terminal_law_of_a_controlled_start_is_the_tilted_reference(m, scheme):
    """Theorem 1 on the chain, with the chain's own p0_T (no running cost)."""
    problem, exact, dense, _ = solved(m, "controlled", False, False, scheme)
    reward = problem.reward_function
    mean, cov, log_z = gaussian_tilt(
        *dense.reference_marginal(dense.K), reward.G / problem.alpha, reward.g / problem.alpha
    )
    law = exact.marginal(problem.horizon)
    close(law.mean, mean)
    close(law.covariance_matrix, cov)
    close(exact.log_z, log_z)
    form = lambda x: exact.value(x, 0.0) / problem.alpha - exact.log_z  # noqa: E731
    x = randn(5, 3, seed=5)  # and nu* = nu exp(v_0 / alpha) / Z
    close(exact.initial.log_prob(x), problem.initial.log_prob(x) + form(x))


@pytest.mark.parametrize("scheme", ["euler", "exact"])
def test_chain_by_quadrature_in_one_dimension(scheme):
    """Three steps, each integral by Gauss-Hermite quadrature: 40^3 paths."""
    one = lambda v: torch.tensor([[v]], dtype=F64)  # noqa: E731
    sde = sc.LinearSDE(one(-0.6), one(0.8), torch.tensor([0.3], dtype=F64))
    problem = sc.ControlProblem(
        sde,
        sc.Dirac(torch.tensor([0.4], dtype=F64)),
        sc.Quadratic(one(0.9), torch.tensor([1.1], dtype=F64)),
        sc.QuadraticCost(one(0.5)),
        alpha=0.8,
    )
    exact = sc.exact_solution(problem, [0.0, 0.2, 0.7, 1.0], scheme=scheme)
    z, w = np.polynomial.hermite_e.hermegauss(40)
    xi = torch.tensor(np.stack(np.meshgrid(z, z, z, indexing="ij"), -1).reshape(-1, 3))
    log_w = torch.tensor(np.log(np.stack(np.meshgrid(w, w, w, indexing="ij"), -1).reshape(-1, 3) / w.sum()).sum(-1))
    x = problem.initial.mean.expand(len(xi), 1)
    middle = x
    for k, h in enumerate(exact.chain.step_sizes):
        log_w = log_w - h * problem.running_cost(x, torch.tensor(0.0)) / problem.alpha
        mean, scale = exact.chain.kernel(k, x)
        x = mean + scale.reshape(1, 1) * xi[:, k : k + 1]
        middle = x if k == 1 else middle
    log_w = log_w + problem.reward(x) / problem.alpha
    close(exact.log_z, log_w.logsumexp(0))
    weights = log_w.softmax(0)
    for law, states in ((exact.marginal(0.7), middle), (exact.marginal(1.0), x)):
        mean = weights @ states
        close(law.mean, mean)
        close(law.variance, weights @ (states - mean) ** 2)


def test_degenerate_noise_of_the_exact_scheme_needs_no_special_case():
    """A noise that reaches one coordinate directly and the other never: sigma of rank 1, square."""
    sde = sc.LinearSDE(
        torch.diag(torch.tensor([-0.5, 0.2], dtype=F64)), torch.diag(torch.tensor([1.0, 0.0], dtype=F64))
    )
    problem = sc.ControlProblem(
        sde, sc.Dirac(torch.ones(2, dtype=F64)), sc.Quadratic(spd(2, 1), randn(2, seed=2)), alpha=0.5
    )
    exact, dense = sc.exact_solution(problem, 4, scheme="exact"), DensePath(problem, 4, "exact")
    close(exact.log_z, dense.log_z)
    assert exact.control(randn(3, 2, seed=0), 0.0)[:, 1].abs().max() == 0  # the idle control costs and moves nothing
    close(exact.bridge(0.25, 0.75, torch.ones(2, dtype=F64)).variance[1], torch.zeros((), dtype=F64))


def test_stiff_rewards_keep_their_digits():
    """G = 1e8: P - PTP cancels, Joseph's form does not. In 1-D, log Z is known by precisions."""
    problem = sc.ControlProblem(
        sc.BrownianMotion(1, torch.eye(1, dtype=F64)),
        sc.Dirac(torch.tensor([0.3], dtype=F64)),
        sc.Quadratic(1e8 * torch.eye(1, dtype=F64)),
    )
    exact = sc.exact_solution(problem, 50)
    s = 1 + 1e8
    close(exact.log_z, torch.tensor(-0.5 * 0.09 * 1e8 / s - 0.5 * np.log(s), dtype=F64), 1e-11)
    assert float(exact.marginal(1.0).variance) == pytest.approx(1 / s, rel=1e-6)


def test_simulated_optimum_has_the_closed_forms():
    problem = linear_quadratic(3, 4, seed=2, start="controlled")
    exact = sc.exact_solution(problem, 20, scheme="exact")
    paths = sc.simulate(problem, 20_000, control=exact.control, seed=1)
    log_w = log_weights(problem, paths)
    assert abs(float(log_w.mean() - exact.elbo)) < 4 * float(log_w.std()) / 20_000**0.5
    assert (
        abs(float((log_w - exact.log_z).exp().mean()) - 1) < 4 * float((log_w - exact.log_z).exp().std()) / 20_000**0.5
    )
    x, log_w = exact.weighted_sample(20_000, seed=2)
    law = exact.marginal(problem.horizon)
    assert ((x.mean(0) - law.mean).abs() / (law.variance / 20_000).sqrt()).max() < 4.5
    assert torch.equal(x, exact.sample(20_000, seed=2)) and not log_w.any()
    assert abs(exact.evaluate(2048, seed=0).gap.value - float(exact.floor)) < 0.05


def test_times_off_the_grid_mean_their_step_and_float32_times_mean_the_grid():
    exact = sc.exact_solution(linear_quadratic(2, 2, start="controlled"), 10)
    x = randn(6, 2, seed=0)
    clock = exact.chain.clock
    close(exact.value(x, clock[7] + 0.4 * (clock[8] - clock[7])), exact.value(x, clock[7]))
    for t in clock[:-1]:
        close(exact.control(x, torch.tensor(t, dtype=torch.float32)), exact.control(x, t))
    t = torch.tensor([clock[k] for k in (5, 12, 5, 9, 12, 7)], dtype=F64)
    rows = torch.stack([exact.value(x[i : i + 1], float(t[i]))[0] for i in range(6)])
    close(exact.value(x, t), rows)
    close(exact.value(x, exact.problem.horizon), exact.problem.reward(x))


def test_outputs_have_the_problems_dtype():
    exact = sc.exact_solution(sc.library.named_problem("ou-quadratic-easy"), 10)
    x = torch.zeros(3, 20)
    outputs = (
        exact.log_z,
        exact.elbo,
        exact.floor,
        exact.value(x, 0.5),
        exact.control(x, 0.5),
        exact.sample(4, seed=0),
        exact.marginal(0.5).mean,
        exact.kernel(x, 1).mean,
        exact.bridge(0.1, 0.5, x).mean,
    )
    assert {out.dtype for out in outputs} == {torch.float32}
    assert exact.log_z.ndim == 0 and "euler" in repr(exact) and "\n" not in repr(exact)
