"""Exact solutions in continuous time: the Riccati route, against transition laws, chains and the HJB equation."""

import itertools
import math

import numpy as np
import pytest
import torch
from cases import F64, but_slow, randn, spd
from dense_gaussian import gaussian_tilt, linear_quadratic

import sdecontrol as sc
from sdecontrol.evaluation.evaluate import log_weights
from sdecontrol.processes.linear import Transition

close = lambda a, b, tol=1e-10: torch.testing.assert_close(a, b, rtol=tol, atol=tol)  # noqa: E731
eye = torch.eye(3, dtype=F64)


def slope(errors, sizes):
    return np.polyfit(np.log(sizes), np.log(errors), 1)[0]


def terminal_law(problem, x=None):
    """Mean and covariance of X_T under the reference, from its start or from a point x."""
    law = problem.reference.transition(0.0, problem.horizon)
    if x is not None:
        return law.matrix @ x + law.shift, law.covariance
    mean, cov = problem.initial.mean, problem.initial.covariance_matrix
    return law.matrix @ mean + law.shift, law.matrix @ cov @ law.matrix.mT + law.covariance


def reward_terms(problem):
    return problem.reward_function.G / problem.alpha, problem.reward_function.g / problem.alpha


@pytest.mark.parametrize("start, varying", list(itertools.product(("dirac", "fixed", "controlled"), (False, True))))
def test_log_z_and_value_are_gaussian_integrals_of_the_transition_law(start, varying):
    """Without a running cost ``Z = E exp(r(X_T)/alpha)``, and the exact scheme's chain has the same one at every step
    size."""
    problem = linear_quadratic(3, 4, seed=3, start=start, running=False, varying=varying)
    exact = sc.exact_solution(problem)
    want = gaussian_tilt(*terminal_law(problem), *reward_terms(problem))[2]
    close(exact.log_z, want)
    close(sc.exact_solution(problem, 7, scheme="exact").log_z, want)
    for x in randn(3, 3, seed=1):
        close(
            exact.value(x[None], 0.0)[0] / problem.alpha,
            gaussian_tilt(*terminal_law(problem, x), *reward_terms(problem))[2],
        )


def test_the_dense_interpolant_is_as_good_as_the_steps():
    """Values at 40 odd times, against the transition law from each of them."""
    problem = linear_quadratic(3, 4, seed=5, start="dirac", running=False)
    exact, x = sc.exact_solution(problem), randn(3, seed=2)
    for t in np.linspace(0.0011, 1.2973, 40).tolist():
        law = problem.reference.transition(t, problem.horizon)
        want = gaussian_tilt(law.matrix @ x + law.shift, law.covariance, *reward_terms(problem))[2]
        close(exact.value(x[None], t)[0] / problem.alpha, want)


@pytest.mark.parametrize(
    "m, start, varying",
    but_slow([(2, "fixed", False), (5, "controlled", True), (4, "controlled", False)], (5, "controlled", True)),
)
def test_the_euler_chain_converges_at_order_one(m, start, varying):
    problem = linear_quadratic(3, m, seed=m, start=start, varying=varying)
    exact, x = sc.exact_solution(problem), randn(4, 3, seed=0)
    sizes = np.array([50, 100, 200, 400, 800])
    chains = [sc.exact_solution(problem, int(K)) for K in sizes]
    t = 0.5 * problem.horizon  # this and 0.4 t are on every grid
    errors = {
        "log_z": [abs(float(c.log_z - exact.log_z)) for c in chains],
        "elbo": [abs(float(c.elbo - exact.elbo)) for c in chains],
        "floor": [float(c.floor) for c in chains],
        "value": [float((c.value(x, t) - exact.value(x, t)).abs().max()) for c in chains],
        "control": [float((c.control(x, t) - exact.control(x, t)).abs().max()) for c in chains],
        "mean": [float((c.marginal(t).mean - exact.marginal(t).mean).norm()) for c in chains],
        "cov": [float((c.marginal(t).covariance_matrix - exact.marginal(t).covariance_matrix).norm()) for c in chains],
        "bridge": [float((c.bridge(0.4 * t, t, x).mean - exact.bridge(0.4 * t, t, x).mean).norm()) for c in chains],
    }
    slopes = {name: -slope(e, sizes) for name, e in errors.items()}
    assert all(abs(s - 1) < 0.1 for s in slopes.values()), slopes


@pytest.mark.parametrize("start", ["dirac", "controlled"])
def test_value_solves_the_hjb_equation_and_the_control_is_its_gradient(start):
    """``v_t + b.grad v + tr(Sigma hess v)/2 + |sigma' grad v|^2/(2 alpha) - f = 0``, ``u* = sigma' grad v / alpha``."""
    problem = linear_quadratic(3, 4, seed=7, start=start, varying=True)
    exact, x = sc.exact_solution(problem), randn(5, 3, seed=1)
    for t in (0.1, 0.6, 1.1):
        residual, gradient, sigma = hjb_terms(problem, exact, x, t)
        assert residual.abs().max() < 1e-7
        close(exact.control(x, t), gradient @ sigma / problem.alpha, 1e-9)


def hjb_terms(problem, exact, x, t):
    A, a, sigma = (torch.from_numpy(c) for c in problem.reference.coefficients(t))
    value = lambda y: exact.value(y[None], t)[0]  # noqa: E731
    gradient = torch.stack([torch.func.grad(value)(y) for y in x])
    hessian = torch.stack([torch.func.hessian(value)(y) for y in x])
    e = 1e-3  # fourth-order difference in time
    v = [exact.value(x, t + j * e) for j in (-2, -1, 1, 2)]
    v_t = (v[0] - 8 * v[1] + 8 * v[2] - v[3]) / (12 * e)
    noise = sigma @ sigma.mT
    f = problem.running_cost(x, torch.tensor(t, dtype=F64))
    residual = (
        v_t
        + ((x @ A.mT + a) * gradient).sum(-1)
        + 0.5 * (hessian * noise).sum((-2, -1))
        + ((gradient @ sigma) ** 2).sum(-1) / (2 * problem.alpha)
        - f
    )
    return residual, gradient, sigma


@pytest.mark.parametrize("varying", [False, True])
def test_theorems_1_to_3_for_a_controlled_start(varying):
    """``p*_T = p_r``; ``p*_t = p0_t exp(v_t/alpha)/Z`` at every t, the learned start's included; bridges are the
    reference's."""
    problem = linear_quadratic(3, 3, seed=4, start="controlled", running=False, varying=varying)
    exact, x = sc.exact_solution(problem), randn(6, 3, seed=0)
    mean, cov, _ = gaussian_tilt(*terminal_law(problem), *reward_terms(problem))
    close(exact.marginal(problem.horizon).mean, mean)
    close(exact.marginal(problem.horizon).covariance_matrix, cov)
    reference, nu = problem.reference, problem.initial
    for t in (-0.7, -0.2, 0.0, 0.4, 1.1):
        law = sc.Gaussian(nu.mean, (1 + t) * nu.covariance_matrix) if t < 0 else reference.marginal(t, nu)
        close(exact.marginal(t).log_prob(x), law.log_prob(x) + exact.value(x, t) / problem.alpha - exact.log_z, 1e-9)
    for s, t in ((0.2, 0.9), (0.0, 1.3)):
        prior, step = reference.marginal(s, nu), reference.transition(s, t)
        want = conditional(prior.mean, prior.covariance_matrix, step, x)
        close(exact.bridge(s, t, x).mean, want[0], 1e-9)
        close(exact.bridge(s, t, x).covariance_matrix, want[1].expand(6, 3, 3), 1e-9)
    brownian = exact.bridge(-0.6, -0.2, x)  # the learned start: a Brownian bridge from the mean
    close(brownian.mean, nu.mean + 0.5 * (x - nu.mean), 1e-9)
    close(brownian.covariance_matrix, (0.4 * 0.4 / 0.8 * nu.covariance_matrix).expand(6, 3, 3), 1e-9)


def conditional(mean, cov, step: Transition, x):
    gain = cov @ step.matrix.mT @ torch.linalg.inv(step.matrix @ cov @ step.matrix.mT + step.covariance)
    return mean + (x - step.matrix @ mean - step.shift) @ gain.mT, cov - gain @ step.matrix @ cov


@pytest.mark.parametrize("steps", [None, 8])
def test_terminal_law_of_a_fixed_gaussian_start(steps):
    """``p*_T(x) = p0_T(x) exp(r/alpha) E[exp(-v(X_0, 0)/alpha) | X_T = x]`` (docs/mathematics.md section 1): not
    p_r."""
    problem = linear_quadratic(3, 3, seed=8, start="fixed", running=False)
    exact = sc.exact_solution(problem, steps, scheme="exact") if steps else sc.exact_solution(problem)
    x = randn(5, 3, seed=3)
    mean, cov = terminal_law(problem)
    step = problem.reference.transition(0.0, problem.horizon)
    start_mean, start_cov = conditional(problem.initial.mean, problem.initial.covariance_matrix, step, x)
    v0 = lambda y: exact.value(y[None], 0.0)[0] / problem.alpha  # noqa: E731
    zero = torch.zeros(3, dtype=F64)
    P, q, c = -torch.func.hessian(v0)(zero), torch.func.grad(v0)(zero), v0(zero)
    remembered = torch.stack([gaussian_tilt(m, start_cov, -P, -q)[2] - c for m in start_mean])
    want = sc.Gaussian(mean, cov).log_prob(x) + problem.reward(x) / problem.alpha + remembered
    close(exact.marginal(problem.horizon).log_prob(x), want, 1e-9)
    tilted = sc.Gaussian(*gaussian_tilt(mean, cov, *reward_terms(problem))[:2])
    assert (tilted.log_prob(x) - want).abs().max() > 0.1
    assert exact.log_z - exact.start_log_z > 0.1


def test_chains_of_a_fixed_start_keep_it():
    problem = linear_quadratic(3, 3, seed=8, start="fixed")
    for exact in (sc.exact_solution(problem), sc.exact_solution(problem, 5)):
        assert exact.initial is problem.initial
        close(exact.marginal(0.0).mean, problem.initial.mean)
        close(exact.marginal(0.0).covariance_matrix, problem.initial.covariance_matrix)


def test_the_continuous_control_drives_any_chain():
    """Its gap to the chain's own optimum is O(h^2) in KL: the best mean shift is within O(h) of it."""
    problem = linear_quadratic(2, 3, seed=6, start="controlled")
    exact = sc.exact_solution(problem)
    paths = sc.simulate(problem, 4096, control=exact.control, time_steps=200, seed=0)
    log_w = log_weights(problem, paths)
    chain = sc.exact_solution(problem, 200)
    assert abs(float(log_w.mean() - chain.elbo)) < 4 * float(log_w.std()) / 64 + 1e-3
    x = randn(5, 2, seed=0)
    for k in (0, 20, 60):
        want = paths.chain.shift_at(k, x, exact.control(x, paths.chain.clock[k]))
        close(exact.control.on_chain(paths.chain)(k, x, None), want)
    assert exact.control.settings == {} and chain.control.settings == {"time_steps": 200, "scheme": "euler"}


def test_like_means_the_chain_of_a_solution():
    problem = linear_quadratic(2, 2, start="dirac")
    chain = sc.exact_solution(problem, [0.0, 0.3, 1.3], scheme="exact")
    close(sc.exact_solution(problem, like=chain).log_z, chain.log_z)
    assert sc.exact_solution(problem, like=sc.exact_solution(problem)).chain is None
    with pytest.raises(TypeError, match="not both"):
        sc.exact_solution(problem, 5, like=chain)
    with pytest.raises(TypeError, match="without time_steps"):
        sc.exact_solution(problem, scheme="exact")


# ---------------------------------------------------------------- what has no exact solution


def convex(strength, **options):
    return sc.ControlProblem(
        sc.BrownianMotion(2, torch.eye(2, dtype=F64)),
        options.pop("initial", sc.Dirac(torch.zeros(2, dtype=F64))),
        sc.Quadratic(-strength * torch.eye(2, dtype=F64)),
        **options,
    )


def test_a_reward_that_is_too_convex_has_no_exact_solution():
    assert math.isfinite(float(sc.exact_solution(convex(0.99)).log_z))  # E exp(0.99 |x|^2 / 2) under N(0, 1) is finite
    close(sc.exact_solution(convex(0.9)).log_z, torch.tensor(-math.log(0.1), dtype=F64), 1e-9)
    with pytest.raises(sc.NoExactSolution, match=r"blows up at t = 0\.0909.*too convex"):
        sc.exact_solution(convex(1.1))
    with pytest.raises(sc.NoExactSolution, match="too convex for the noise"):
        sc.exact_solution(convex(1.1), 50)
    with pytest.raises(sc.NoExactSolution, match="over the controlled start"):
        sc.exact_solution(convex(0.9, initial=sc.Gaussian(torch.zeros(2, dtype=F64), 1.0), start="controlled"))
    kept = sc.exact_solution(convex(0.9, initial=sc.Gaussian(torch.zeros(2, dtype=F64), 1.0), start="fixed"))
    assert math.isfinite(float(kept.start_log_z))  # each start has its Z; only their mean is infinite
    with pytest.raises(sc.NoExactSolution, match="over the start"):
        _ = kept.log_z
    assert "unknown" in repr(kept)


def test_problems_without_a_closed_form_name_what_is_missing():
    sde, start = sc.BrownianMotion(2, torch.eye(2, dtype=F64)), sc.Dirac(torch.zeros(2, dtype=F64))
    mixture = sc.GaussianMixture(torch.ones(2, dtype=F64), randn(2, 2, seed=0), 0.5)
    model = torch.nn.Linear(2, 2).double()
    chain = sc.diffusion_chain(
        lambda x, t: model(x), torch.linspace(0.99, 0.01, 20, dtype=F64), prediction="noise", shape=(2,), steps=5
    )
    bad = {
        "reward": sc.ControlProblem(
            sc.BrownianMotion(3, eye), sc.Dirac(torch.zeros(3, dtype=F64)), lambda x: x.prod(-1).tanh()
        ),
        "running_cost": sc.ControlProblem(
            sc.BrownianMotion(3, eye), sc.Dirac(torch.zeros(3, dtype=F64)), None, lambda x, t: x.logsumexp(-1)
        ),
        "condition": sc.ControlProblem(sde, start, lambda x, y: x.sum(-1) * y, condition=torch.ones(3, dtype=F64)),
        "GaussianMixture start": sc.ControlProblem(sde, mixture, start="controlled"),
        "drift": sc.ControlProblem(
            sc.SDE(lambda x, t: -(x.roll(1, 1) ** 3), 1.0, dim=3), sc.Dirac(torch.zeros(3, dtype=F64))
        ),
        "DiffusionChain": sc.ControlProblem(chain),
    }
    for match, problem in bad.items():
        with pytest.raises(sc.NoExactSolution, match=match):
            sc.exact_solution(problem)
    with pytest.raises(TypeError, match="ControlProblem"):
        sc.exact_solution(sde)
    fixed = sc.exact_solution(sc.ControlProblem(sde, mixture, sc.Linear(torch.ones(2, dtype=F64)), start="fixed"), 5)
    close(fixed.control(randn(2, 2, seed=1), 0.5), torch.ones(2, 2, dtype=F64))
    with pytest.raises(sc.NoExactSolution, match="GaussianMixture start"):
        _ = fixed.log_z


def test_misuse_is_named():
    problem = linear_quadratic(2, 2, start="dirac")
    exact, chain = sc.exact_solution(problem), sc.exact_solution(problem, 5)
    x = randn(4, 2, seed=0)
    with pytest.raises(sc.NoExactSolution, match="one step of a chain"):
        exact.kernel(x, 0)
    with pytest.raises(ValueError, match="k must be a step from 0 to 4"):
        chain.kernel(x, 5)
    for solution in (exact, chain):
        with pytest.raises(ValueError, match=r"t must be from 0 to 1\.3"):
            solution.value(x, 1.4)
        with pytest.raises(ValueError, match=r"x must be .* \(batch, 2\)"):
            solution.control(x[0], 0.1)
        with pytest.raises(ValueError, match=r"shape \(\) or \(4,\)"):
            solution.control(x, torch.zeros(3))
        with pytest.raises(ValueError, match="needs s < t"):
            solution.bridge(0.5, 0.5, x)
    with pytest.raises(ValueError, match="same step"):
        chain.bridge(0.01, 0.02, x)


def test_the_learned_start_has_its_own_control_shape():
    exact = sc.exact_solution(linear_quadratic(2, 3, start="controlled"))
    x = randn(4, 2, seed=0)
    assert exact.control(x, -0.5).shape == (4, 2) and exact.control(x, 0.5).shape == (4, 3)
    with pytest.raises(ValueError, match="before and after 0"):
        exact.control(x, torch.tensor([-0.5, 0.5, -0.5, 0.5], dtype=F64))


def test_a_degenerate_start_moves_along_its_own_line_only():
    cov = torch.diag(torch.tensor([1.0, 0.0], dtype=F64))
    problem = sc.ControlProblem(
        sc.BrownianMotion(2, torch.eye(2, dtype=F64)),
        sc.Gaussian(torch.zeros(2, dtype=F64), cov),
        sc.Quadratic(spd(2, 1), randn(2, seed=0)),
        start="controlled",
    )
    for exact in (sc.exact_solution(problem), sc.exact_solution(problem, 10)):
        law = exact.initial
        assert float(law.mean[0].abs()) > 1e-3 and float(law.mean[1].abs()) < 1e-12 and float(law.variance[1]) < 1e-12
