"""Exact solutions on grids, against closed forms, direct quadrature and published figures."""

import math

import numpy as np
import pytest
import torch
from cases import F64, randn, slow_but

import sdecontrol as sc
from sdecontrol.evaluation.evaluate import log_weights
from sdecontrol.exact.grid_chain import GridChainSolution
from sdecontrol.exact.grid_process import GridSolution
from sdecontrol.exact.grids import GridLaw

close = lambda a, b, tol=1e-10: torch.testing.assert_close(a, b, rtol=tol, atol=tol)  # noqa: E731
x5 = torch.linspace(-1.5, 1.5, 5, dtype=F64)[:, None]


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(F64)


def line(start="dirac", *, convex=False, m=1, varying=False):
    """A linear-quadratic problem of one dimension, m noises."""
    A = (lambda t: torch.tensor([[-0.4]]) + t.to(F64) * 0.5) if varying else torch.tensor([[-0.4]])
    sde = sc.LinearSDE(A, torch.full((1, m), 0.8) / m**0.5, torch.full((1,), 0.3), horizon=1.3)
    initial = sc.Dirac(torch.full((1,), 0.4)) if start == "dirac" else sc.Gaussian(torch.full((1,), 0.4), 0.3)
    return sc.ControlProblem(
        sde,
        initial,
        sc.Quadratic(torch.tensor([[-0.3 if convex else 1.5]]), torch.full((1,), 0.7)),
        sc.QuadraticCost(torch.tensor([[0.5]])),
        alpha=0.7,
        start=None if start == "dirac" else start,
    )


def bumps(x):
    """A reward with two wells, of one number per row."""
    return -1.5 * ((x**2 - 1) ** 2).sum(-1) + 0.4 * torch.sin(3 * x).sum(-1)


def ou(reward=bumps, alpha=0.8, start=0.3, horizon=1.0):
    return sc.ControlProblem(
        sc.LinearSDE(torch.tensor([[-0.7]]), torch.tensor([[0.9]]), torch.tensor([0.2]), horizon=horizon),
        sc.Dirac(torch.tensor([start])),
        reward,
        alpha=alpha,
    )


def average(law, x, reward, alpha, points=4001):
    """``log E exp(r(X_T)/alpha)`` from each row of x ``(n, 1)`` by quadrature of the transition law, and its derivative
    in x."""
    z = torch.linspace(-12, 12, points)
    sd = law.covariance[0, 0].sqrt()
    y = (x * law.matrix[0, 0] + law.shift[0]) + sd * z
    log = reward(y.reshape(-1, 1)).reshape(y.shape) / alpha - 0.5 * z**2
    weights = log.softmax(1)
    slope = (weights * z).sum(1) / sd * law.matrix[0, 0]
    return log.logsumexp(1) - (-0.5 * z**2).logsumexp(0), slope


# ---------------------------------------------------------------- against closed forms


@pytest.mark.parametrize("start, convex, m", [("dirac", False, 2), ("fixed", True, 1), ("controlled", False, 1)])
def test_linear_quadratic_problems_in_continuous_time(start, convex, m):
    problem = line(start, convex=convex, m=m)
    want, grid = sc.exact_solution(problem), GridSolution(problem)
    close(grid.log_z, want.log_z, 1e-8)
    close(grid.start_log_z, want.start_log_z, 1e-8)
    for t in (0.0, 0.5, 1.1, 1.3) if start != "controlled" else (-1.0, -0.4, 0.0, 0.8):
        close(grid.value(x5, t), want.value(x5, t), 1e-7)
        close(grid.control(x5, t), want.control(x5, t), 1e-7)
    assert grid.error < 1e-6


def test_coefficients_that_depend_on_time_in_continuous_time():
    problem = line(varying=True)
    want, grid = sc.exact_solution(problem), GridSolution(problem)
    close(grid.log_z, want.log_z, 1e-7)
    for t in (0.0, 0.6, 1.2):
        close(grid.control(x5, t), want.control(x5, t), 1e-6)


@pytest.mark.parametrize(
    "start, convex, m, steps, scheme",
    [
        ("dirac", False, 2, 20, "euler"),
        ("fixed", True, 1, 6, "exact"),
        ("controlled", False, 2, 12, "euler"),
        ("controlled", True, 1, [0.0, 0.1, 0.7, 1.3], "exact"),
        ("fixed", False, 1, 1, "euler"),
    ],
)
@pytest.mark.parametrize("varying", [False, True])
def test_linear_quadratic_chains(start, convex, m, steps, scheme, varying):
    """Soft and best mean-shift chain, values, controls and laws: to 1e-10."""
    problem = line(start, convex=convex, m=m, varying=varying)
    want = sc.exact_solution(problem, steps, scheme=scheme)
    grid = GridChainSolution(problem, problem.chain(steps, scheme), want.settings)
    for name in ("log_z", "start_log_z", "elbo", "floor"):
        close(getattr(grid, name), getattr(want, name))
    assert want.floor > 1e-4
    chain = want.chain
    for k in range(chain.steps):
        close(grid.value(x5, chain.clock[k]), want.value(x5, chain.clock[k]))
        close(grid.control(x5, chain.clock[k]), want.control(x5, chain.clock[k]))
        close(grid.control.on_chain(chain)(k, x5, None), want.control.on_chain(chain)(k, x5, None))
        ours, theirs = grid.kernel(0.3 * x5 + 0.4, k), want.kernel(0.3 * x5 + 0.4, k)
        close(ours.mean, theirs.mean)
        close(ours.log_prob(theirs.mean + 0.1), theirs.log_prob(theirs.mean + 0.1), 1e-8)
    ends = torch.from_numpy(np.stack([vars(grid)[name] for name in ("_lows", "_highs")]))
    for k in range(0 if convex else chain.steps):  # parabolas go on beyond the grid: at its ends nothing is lost
        close(grid.value(ends, chain.clock[k]) / want.value(ends, chain.clock[k]), torch.ones(2), 1e-10)
    for t in chain.clock[chain.start + 1 :]:
        close(grid.marginal(t).mean, want.marginal(t).mean)
        close(grid.marginal(t).variance, want.marginal(t).variance)
        close(grid.marginal(t).log_prob(x5[1:4]), want.marginal(t).log_prob(x5[1:4]), 1e-8)


@pytest.mark.slow
def test_mixture_models_in_one_dimension():
    """The drift of a mixture model as a plain function, against the mixture's closed form."""
    mixture = sc.GaussianMixture(torch.tensor([0.6, 0.4]), torch.tensor([[-1.5], [1.0]]), torch.tensor([0.2, 0.4]))
    reference = sc.generative_sde(mixture, schedule=sc.VP(0.5, 2.0))
    reward = sc.Quadratic(torch.tensor([[0.8]]), torch.tensor([1.2]))
    want = sc.exact_solution(sc.ControlProblem(reference, reward=reward, alpha=0.6, start="controlled"))
    plain = sc.SDE(
        lambda x, t: reference.drift(x, t), lambda x, t: reference.diffusion(x, t), dim=1, horizon=reference.horizon
    )
    grid = sc.exact_solution(sc.ControlProblem(plain, sc.Dirac(torch.zeros(1)), reward, alpha=0.6))
    assert isinstance(grid, GridSolution)
    for t in (0.0, 0.4, 0.9):
        close(grid.value(x5, t), want.value(x5, t), 1e-6)
        close(grid.control(x5, t), want.control(x5, t), 1e-5)


# ---------------------------------------------------------------- against quadrature


def test_any_reward_by_quadrature_of_the_transition_law():
    """``v = alpha log E exp(r(X_T)/alpha)``, ``u* = sigma v'/alpha``; and a chain of exact transitions has the same
    soft value."""
    problem = ou()
    grid, chain = sc.exact_solution(problem), sc.exact_solution(problem, 5, scheme="exact")
    assert isinstance(grid, GridSolution) and isinstance(chain, GridChainSolution)
    for t in (0.0, 0.4, 0.8):
        law = problem.reference.transition(t, 1.0)
        value, slope = average(law, x5, bumps, 0.8)
        close(grid.value(x5, t) / 0.8, value, 1e-7)
        close(grid.control(x5, t)[:, 0], 0.9 * slope, 1e-6)
        close(chain.value(x5, t) / 0.8, value, 1e-9)
    close(grid.log_z, chain.log_z, 1e-7)
    close(chain.value(x5, 1.0), bumps(x5))
    assert chain.elbo < chain.log_z < chain.elbo + 1


def test_marginals_of_the_chain_are_the_tilted_transition_law():
    """Theorem 2: ``p*_k = p0_k exp(w_k)/Z``, with exact transitions."""
    problem = ou()
    chain = sc.exact_solution(problem, 5, scheme="exact")
    for t in (0.2, 0.6, 1.0):
        law = problem.reference.transition(0.0, t)
        p0 = sc.Gaussian(law.matrix @ problem.initial.mean + law.shift, law.covariance)
        want = p0.log_prob(x5) + chain.value(x5, t) / 0.8 - chain.log_z
        close(chain.marginal(t).log_prob(x5), want, 1e-8)
    x = chain.sample(20_000, seed=1)
    law = chain.marginal(1.0)
    assert abs(float(x.mean() - law.mean[0])) < 4 * float(law.variance[0] / 20_000) ** 0.5
    assert abs(float(x.var() / law.variance[0]) - 1) < 0.06
    assert torch.equal(x, chain.sample(20_000, seed=1)) and chain.marginal(0.0) is problem.initial


def nonlinear(steps_matter=None):
    """Nonlinear drift, state-dependent noise, running cost: nothing here has a closed form."""
    return sc.ControlProblem(
        sc.SDE(lambda x, t: torch.sin(2 * x) - x * t, lambda x, t: 0.6 + 0.3 * torch.cos(x), dim=1),
        sc.Dirac(torch.tensor([0.2])),
        bumps,
        lambda x, t: 0.5 * torch.cos(x).sum(-1) * (1 + t),
        alpha=0.9,
    )


@pytest.mark.slow
def test_two_steps_by_nested_quadrature():
    """Both dynamic programmes of a nonlinear chain with state-dependent noise, by brute force."""
    problem = nonlinear()
    exact = sc.exact_solution(problem, 2)
    z = torch.linspace(-9, 9, 91)
    p = (-0.5 * z**2).softmax(0)
    shifts = torch.linspace(-3, 3, 3001)
    f = lambda x, t: 0.5 * problem.running_cost(x, torch.tensor(t)) / 0.9  # noqa: E731

    def parts(x, t):
        t = torch.tensor(t)
        return (x + 0.5 * problem.reference.drift(x, t))[:, 0], (0.5**0.5 * problem.reference.diffusion(x, t))[:, 0]

    def soft_and_shifted(x):
        """Values of the second step at x ``(n, 1)``."""
        mean, scale = parts(x, 0.5)
        r = lambda y: bumps(y.reshape(-1, 1)).reshape(y.shape) / 0.9  # noqa: E731
        soft = (r(mean[:, None] + scale[:, None] * z) + p.log()).logsumexp(1) - f(x, 0.5)
        # the smoothed reward as a polynomial in c, fitted where it is fine enough to be exact
        smooth = lambda c: (r(mean[:, None, None] + scale[:, None, None] * (c[..., None] + z)) * p).sum(-1) - 0.5 * c**2  # noqa: E731
        c = torch.zeros(len(x), 1)
        grid = torch.linspace(-4, 4, 41).expand(len(x), -1)
        for width in (4.0, 0.2, 0.01, 5e-4, 2.5e-5):
            around = c + width * torch.linspace(-1, 1, grid.shape[1])
            c = around.gather(1, smooth(around).argmax(1, keepdim=True))
        return soft, smooth(c)[:, 0] - f(x, 0.5), c[:, 0] / 0.5**0.5

    soft1, _, control1 = soft_and_shifted(x5)
    close(exact.value(x5, 0.5) / 0.9, soft1, 1e-9)
    close(exact.control(x5, 0.5)[:, 0], control1, 1e-4)  # a maximum is located to the root of its value's error
    mean, scale = parts(torch.tensor([[0.2]]), 0.0)
    soft, shifted, _ = soft_and_shifted((mean + scale * z)[:, None])
    cost = f(torch.tensor([[0.2]]), 0.0)
    close(exact.log_z, (soft + p.log()).logsumexp(0) - cost[0], 1e-9)
    # the first step's shift, by a spline-free scan: values of V_1 at mean + scale (c + z) from a Chebyshev fit
    nodes = (mean + scale * 13 * torch.cos(torch.linspace(0, math.pi, 160)))[:, None]
    fit = np.polynomial.chebyshev.Chebyshev.fit(nodes[:, 0].numpy(), soft_and_shifted(nodes)[1].numpy(), 110)
    V = torch.from_numpy(fit((mean + scale * (shifts[:, None] + z)).numpy()))
    best = ((V * p).sum(1) - 0.5 * shifts**2).max() - cost[0]
    close(exact.elbo, best, 3e-6)
    assert shifted.shape == z.shape and exact.floor > 1e-3


@pytest.mark.slow
def test_log_weights_average_to_z_and_the_elbo_is_reached():
    """``E_{P^u}[dQ_fine/dP^u] = 1`` and ``E log w = elbo`` on paths of the best mean-shift control."""
    problem = nonlinear()
    exact = sc.exact_solution(problem, 20)
    paths = sc.simulate(problem, 20_000, control=exact.control, time_steps=20, seed=0)
    log_w = log_weights(problem, paths)
    ratio = (log_w - exact.log_z).exp()
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / 20_000**0.5 and float(ratio.std()) < 0.5
    assert abs(float(log_w.mean() - exact.elbo)) < 4 * float(log_w.std()) / 20_000**0.5
    assert 0 < exact.floor < 0.1
    assert exact.evaluate(256, seed=0).exact


@pytest.mark.parametrize("make", [ou, pytest.param(nonlinear, marks=pytest.mark.slow)])
def test_chains_approach_the_process_at_order_one(make):
    problem = make()
    continuous = sc.exact_solution(problem)
    gaps = [abs(float(sc.exact_solution(problem, K, scheme="euler").log_z - continuous.log_z)) for K in (20, 80)]
    assert 1.8 < math.log2(gaps[0] / gaps[1]) < 2.2  # a quarter of the step, a quarter of the error


# ---------------------------------------------------------------- the double well of the card


@pytest.fixture(scope="module")
def wells():
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    problem = sc.library.named_problem("double-well")
    made = problem, sc.exact_solution(problem), sc.exact_solution(problem, 200)
    torch.set_default_dtype(before)
    return made


@pytest.mark.slow
def test_double_well_published_figures(wells):
    """Mean |u*|^2 0.587 on Euler paths of K = 200, and the discretised optimum 2.3e-3 away from the continuous one."""
    problem, continuous, chain = wells
    assert continuous.error < 1e-6 and chain.error < 1e-8
    assert [len(b.members) for b in continuous.blocks] == [3, 7]
    for control, size in ((continuous.control, 0.587),):
        paths = sc.simulate(problem, 4096, control=control, time_steps=200, seed=0)
        square = (paths.shifts**2).sum((0, 2))
        assert abs(float(square.mean()) - size) < 4 * float(square.std()) / 64 + 5e-4

    class Solved:
        pass

    solved = Solved()
    solved.problem, solved.chain, solved.control = problem, problem.chain(200), continuous.control
    error = sc.control_error(solved, chain, n=2048)
    assert abs(error.absolute.value - 2.3e-3) < 4 * error.absolute.stderr + 5e-5


@pytest.mark.slow
def test_double_well_in_continuous_time_has_0_635():
    """On fine Euler paths, extrapolated: E|u*|^2 is that of the process itself."""
    problem = sc.library.named_problem("double-well")
    exact = sc.exact_solution(problem)
    sizes = []
    for steps in (400, 1600):
        paths = sc.simulate(problem, 8192, control=exact.control, time_steps=steps, seed=0)
        sizes.append((paths.shifts**2).sum((0, 2)))
    limit = (4 * sizes[1] - sizes[0]) / 3  # error of order one in the step
    assert abs(float(limit.mean()) - 0.635) < 4 * float(limit.std()) / 8192**0.5 + 1e-3


@pytest.mark.slow
def test_double_well_log_z_by_the_linear_equation(wells):
    """``psi`` by its eigenfunctions: with ``b = -U'``, ``exp(-U) psi`` solves a Schroedinger equation of potential
    ``(U'^2 - U'')/2``, here on sinc functions. Shares nothing with the solver."""
    n, dx = 241, 0.025
    x = dx * (np.arange(n) - n // 2)
    apart = np.arange(n)[:, None] - np.arange(n)[None]
    second = np.where(apart == 0, -(np.pi**2) / 3, -2.0 * (-1.0) ** apart / np.where(apart == 0, 1, apart) ** 2) / dx**2
    total = 0.0
    for kappa, nu, count in ((5, 3, 3), (1, 1, 7)):
        U, slope, bend = kappa * (x**2 - 1) ** 2, 4 * kappa * x * (x**2 - 1), 4 * kappa * (3 * x**2 - 1)
        energy, modes = np.linalg.eigh(-0.5 * second + np.diag(0.5 * (slope**2 - bend)))
        end = np.exp(-U - nu * (x**2 - 1) ** 2)
        psi = math.exp(kappa) * (modes[n // 2] * np.exp(-energy)) @ (modes.T @ end)
        total += count * math.log(psi)
    assert float(wells[1].log_z) == pytest.approx(total, abs=1e-8)
    assert total == pytest.approx(-2.0874259757, abs=1e-8)  # the card's constant


@pytest.mark.slow
def test_value_solves_the_hjb_equation(wells):
    problem, exact, _ = wells
    x = 0.9 * randn(4, 10, seed=1).tanh()
    for t in (0.3, 0.9):
        e, s = 2e-3, 1e-3
        v = lambda dx, dt, t=t: exact.value(x + dx, t + dt)  # noqa: E731
        v_t = (v(0, -2 * s) - 8 * v(0, -s) + 8 * v(0, s) - v(0, 2 * s)) / (12 * s)
        lines = [(v(e * d, 0), v(-e * d, 0), v(2 * e * d, 0), v(-2 * e * d, 0)) for d in torch.eye(10)]
        gradient = torch.stack([(8 * (a - b) - (c - d)) / (12 * e) for a, b, c, d in lines], 1)
        second = torch.stack([(16 * (a + b) - (c + d) - 30 * v(0, 0)) / (12 * e * e) for a, b, c, d in lines], 1)
        drift = problem.reference.drift(x, torch.tensor(t))
        residual = v_t + (drift * gradient).sum(1) + 0.5 * second.sum(1) + 0.5 * (gradient**2).sum(1)
        assert residual.abs().max() < 2e-3
        close(exact.control(x, t), gradient, 1e-5)


# ---------------------------------------------------------------- what is separable


def rotated(angle):
    """Two independent coordinates, seen in turned axes: the coordinates are coupled, the answer is known."""
    c, s = math.cos(angle), math.sin(angle)
    Q = torch.tensor([[c, -s], [s, c]])
    drift = lambda y: torch.stack((torch.sin(y[:, 0]) - y[:, 0], -y[:, 1]), 1)  # noqa: E731
    reward = lambda y: -torch.stack((y[:, 0] ** 4 / 4 - y[:, 0], (y[:, 1] - 0.5) ** 2), 1).sum(1)  # noqa: E731
    cost = lambda y: 0.3 * torch.sin(y).sum(1)  # noqa: E731
    return sc.ControlProblem(
        sc.SDE(lambda x, t: drift(x @ Q) @ Q.mT, Q @ torch.diag(torch.tensor([1.0, 0.7])), dim=2),
        sc.Gaussian(Q @ torch.tensor([0.3, -0.2]), Q @ torch.diag(torch.tensor([0.1, 0.2])) @ Q.mT),
        lambda x: reward(x @ Q),
        lambda x, t: cost(x @ Q),
        start="fixed",
    ), Q


def test_a_coupled_pair_is_solved_in_the_plane():
    (straight, _), (turned, Q) = rotated(0.0), rotated(0.6)
    want, grid = sc.exact_solution(straight), sc.exact_solution(turned)
    assert [b.dim for b in want.blocks] == [1, 1] and [b.dim for b in grid.blocks] == [2]
    y = 0.7 * randn(6, 2, seed=0)
    close(grid.log_z, want.log_z, 1e-5)
    close(grid.start_log_z, want.start_log_z, 1e-5)
    for t in (0.0, 0.37, 0.9):
        close(grid.value(y @ Q.mT, t), want.value(y, t), 2e-5)
        close(grid.control(y @ Q.mT, t), want.control(y, t), 2e-4)


@pytest.mark.slow
def test_the_chain_of_a_coupled_pair_is_solved_in_the_plane():
    """Equal Euler steps in turned axes: values are those of the two coordinates, and the mean of the optimal kernel's
    noise reaches what the best shift does but for a little."""
    (straight, _), (turned, Q) = rotated(0.0), rotated(0.6)
    want, grid = sc.exact_solution(straight, 10), sc.exact_solution(turned, 10)
    y = 0.7 * randn(6, 2, seed=0)
    close(grid.log_z, want.log_z, 1e-5)
    close(grid.start_log_z, want.start_log_z, 1e-5)
    for t in (0.0, 0.3, 0.9):
        close(grid.value(y @ Q.mT, t), want.value(y, t), 2e-5)
        k = round(10 * t)
        mean, scale = want.chain.kernel(k, y, None)
        noise = (want.kernel(y, k).mean - mean) @ scale[0].inverse()
        close(grid.control(y @ Q.mT, t) * 0.1**0.5, noise, 2e-4)
    assert -1e-5 < float(want.elbo - grid.elbo) < 1e-3
    with pytest.raises(sc.NoExactSolution, match="laws of a chain of two coupled coordinates"):
        grid.sample(5)


def oscillator(noise, reward, steps=20):
    """A damped spring that is pushed; ``noise`` one column or two."""
    A = torch.tensor([[0.0, 1.0], [-2.0, -0.3]])
    start = sc.Dirac(torch.tensor([0.4, -0.3]))
    return sc.ControlProblem(sc.LinearSDE(A, noise, horizon=1.0), start, reward), steps


@pytest.mark.parametrize("columns", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_pair_with_noise_in_some_directions_is_that_of_the_linear_quadratic_chain(columns):
    """Value, control and what it reaches, where the optimal kernel's mean is the best shift."""
    noise = torch.tensor([[0.0], [0.8]]) if columns == 1 else torch.tensor([[0.5, 0.0], [0.3, 0.8]])
    P, q = torch.tensor([[1.5, 0.4], [0.4, 0.6]]), torch.tensor([1.0, -0.5])
    problem, steps = oscillator(noise, sc.Quadratic(P, q))
    plain, _ = oscillator(noise, lambda x: -0.5 * ((x @ P) * x).sum(1) + x @ q)
    want, grid = sc.exact_solution(problem, steps), sc.exact_solution(plain, steps)
    assert [b.dim for b in grid.blocks] == [2]
    shift = float(want.value(torch.zeros(1, 2), 1.0) - grid.value(torch.zeros(1, 2), 1.0))
    close(grid.log_z + shift, want.log_z, 1e-5)
    close(grid.elbo + shift, want.elbo, 1e-5)
    x = torch.tensor([0.2, 0.1]) + 0.4 * randn(6, 2, seed=1)
    for t in (0.0, 0.5, 0.95):
        close(grid.value(x, t) + shift, want.value(x, t), 1e-4)
        close(grid.control(x, t), want.control(x, t), 1e-3)


@pytest.mark.slow
def test_a_grid_of_a_pair_takes_in_a_rare_way_that_no_path_has_gone():
    """A well at eight standard deviations with four in a thousand of the mass: paths that look around do not see it."""
    noise = torch.tensor([[0.0], [1.0]])
    still, steps = oscillator(noise, sc.Linear(torch.zeros(2)))
    law = sc.exact_solution(still, steps).marginal(1.0)
    mean, sd = float(law.mean[0]), float(law.variance[0].sqrt())
    far, width, share = mean + 8 * sd, 0.5 * sd, 0.004
    both = math.hypot(width, sd)
    mass = width / both * math.exp(-0.5 * ((far - mean) / both) ** 2)
    high = math.log(share / mass)
    reward = lambda x: torch.log1p((high - 0.5 * ((x[:, 0] - far) / width) ** 2).exp())  # noqa: E731
    grid = sc.exact_solution(oscillator(noise, reward)[0], steps)
    assert abs(float(grid.log_z) - math.log1p(share)) < 2e-4


def test_a_pair_with_noise_of_its_state_has_no_solution_on_a_chain():
    sde = sc.SDE(lambda x, t: -x.roll(1, 1), lambda x, t: 1 + 0.1 * x.sin(), dim=2)
    problem = sc.ControlProblem(sde, sc.Dirac(torch.zeros(2)), lambda x: -x.square().sum(1))
    with pytest.raises(sc.NoExactSolution, match=r"diffusion.*does not depend on the state"):
        sc.exact_solution(problem, 10)


@pytest.mark.slow
def test_a_pendulum_that_is_swung_up_by_the_noise_of_its_torque():
    """Against a recursion that is periodic in the angle, -13.3166; paths of more than one turn are 0.0098 of it."""
    drift = lambda x, t: torch.stack([x[:, 1], -9.81 * x[:, 0].sin() - 0.1 * x[:, 1]], 1)  # noqa: E731
    reward = lambda x: -10 * (1 + x[:, 0].cos()) - 0.5 * x[:, 1] ** 2  # noqa: E731
    problem = sc.ControlProblem(
        sc.SDE(drift, torch.tensor([[0.0], [2.0]]), dim=2, horizon=3.0),
        sc.Dirac(torch.zeros(2)),
        reward,
        lambda x, t: 1 + x[:, 0].cos(),
        alpha=0.5,
    )
    exact = sc.exact_solution(problem, 60)
    assert abs(float(exact.log_z) + 13.3166) < 1e-3
    assert abs(float(exact.control(torch.zeros(1, 2), 0.0))) < 1e-3  # two ways, equally good


def three(drift=None, reward=None, cost=None, sigma=1.0, d=3):
    return sc.ControlProblem(
        sc.SDE(drift or (lambda x, t: -(x**3)), sigma, dim=d),
        sc.Dirac(torch.zeros(d)),
        reward or (lambda x: -(x**4).sum(-1)),
        cost,
    )


TINY = 1e-9
COUPLED = {
    "drift": three(drift=lambda x, t: -x + TINY * torch.roll(x, 1, 1)),
    "drift, late": three(drift=lambda x, t: -x + (t > 0.98) * x.sum(1, keepdim=True)),
    "reward": three(reward=lambda x: -(x**2).sum(-1) - TINY * x.prod(-1)),
    "running_cost": three(cost=lambda x, t: torch.logsumexp(x, -1)),
    "diffusion": three(sigma=lambda x, t: 1 + 0.1 * torch.cos(x.sum(1, keepdim=True)).expand_as(x)),
    "diffusion, shared noise": three(sigma=torch.ones(3, 1)),
}


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_coordinates_are_refused_by_name(name):
    for steps in (None, 100):
        with pytest.raises(sc.NoExactSolution, match=f"{name.split(',')[0]}.*Coordinates 0, 1, 2 act on each other"):
            sc.exact_solution(COUPLED[name], steps)


def test_functions_that_are_separable_in_disguise_are_recognised():
    """A matrix diffusion, a permutation, products of exponentials: what counts is what the functions do."""
    permutation = torch.tensor([2, 0, 1])
    problem = three(
        drift=lambda x, t: -(x[:, permutation] ** 3)[:, permutation.argsort()],
        reward=lambda x: (-(x**2)).exp().prod(-1).log() - 2.0,
        cost=lambda x, t: (x + 1).square().sum(-1),
        sigma=lambda x, t: torch.diag_embed(1 + 0.1 * x.sin()),
    )
    exact = sc.exact_solution(problem)
    assert [b.members for b in exact.blocks] == [[(0,), (1,), (2,)]]
    one = three(
        reward=lambda x: -(x**2).sum(-1) - 2 / 3,
        cost=lambda x, t: (x + 1).square().sum(-1),
        sigma=lambda x, t: 1 + 0.1 * x.sin(),
        d=1,
    )
    close(exact.log_z, 3 * sc.exact_solution(one).log_z, 1e-7)


@pytest.mark.slow
def test_blocks_that_differ_have_grids_of_their_own_and_constants_count_once():
    shift = torch.tensor([0.0, 0.5, 0.0])
    problem = three(reward=lambda x: -((x - shift) ** 4).sum(-1) + 7.0, cost=lambda x, t: x[:, 0] * 0 + 3.0)
    exact, chain = sc.exact_solution(problem), sc.exact_solution(problem, 200)
    assert [len(b.members) for b in exact.blocks] == [2, 1]
    plain = sc.exact_solution(three(reward=lambda x: -((x - shift) ** 4).sum(-1)))
    close(exact.log_z, plain.log_z + 4.0, 1e-7)
    assert abs(float(chain.log_z - exact.log_z)) < 0.02
    assert exact.control(torch.zeros(2, 3), 0.5).shape == (2, 3)


@pytest.mark.slow
def test_high_dimensions_cost_one_grid_if_coordinates_are_equal():
    d = 300
    problem = sc.ControlProblem(
        sc.SDE(lambda x, t: -(x**3), 0.8, dim=d), sc.Dirac(torch.zeros(d)), lambda x: -(x - 1).abs().pow(4).sum(-1)
    )
    exact = sc.exact_solution(problem, 20)
    assert [len(b.members) for b in exact.blocks] == [d]


@pytest.mark.slow
def test_what_has_no_grid_solution_says_why():
    explosive = sc.ControlProblem(sc.SDE(lambda x, t: x**3 * 9, 1.0, dim=1), sc.Dirac(torch.ones(1)), bumps)
    convex = ou(lambda x: 3 * (x**2).sum(-1) + 0 * x[:, 0])
    for match, problem in (
        ("run to infinity", explosive),
        ("infinite|leave every grid", convex),
    ):
        with pytest.raises(sc.NoExactSolution, match=match):
            sc.exact_solution(problem)
    exact, chain = sc.exact_solution(ou()), sc.exact_solution(ou(), 5)
    with pytest.raises(sc.NoExactSolution, match="one step of a chain"):
        exact.kernel(x5, 0)
    for solution in (exact, chain):
        with pytest.raises(sc.NoExactSolution, match="bridge"):
            solution.bridge(0.2, 0.5, x5)
        with pytest.raises(ValueError, match=r"x must be .* \(batch, 1\)"):
            solution.control(x5[0], 0.1)
    with pytest.raises(sc.NoExactSolution, match="simulate with control"):
        exact.marginal(0.5)
    with pytest.raises(ValueError, match="k must be a step from 0 to 4"):
        chain.kernel(x5, 5)
    with pytest.raises(sc.NoExactSolution, match="narrower than the grid"):
        sc.exact_solution(ou(), [0.0, 0.5, 1 - 1e-6, 1.0]).kernel(x5, 2)


@pytest.mark.parametrize("module", slow_but([False, True], True))
def test_single_precision_follows_the_problem(module):
    """Plain functions are asked in float64; a float32 module is asked as it is."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).float()
    reward = (lambda x: net(x)[:, 0]) if module else bumps
    sde = sc.SDE(lambda x, t: -x, 0.9, dim=1)
    problem = sc.ControlProblem(sde, sc.Dirac(torch.zeros(1, dtype=torch.float32)), reward)
    exact, chain = sc.exact_solution(problem), sc.exact_solution(problem, 10)
    x = x5.float()
    for solution in (exact, chain):
        outputs = (solution.log_z, solution.elbo, solution.value(x, 0.3), solution.control(x, 0.3))
        assert {out.dtype for out in outputs} == {torch.float32}
    assert chain.kernel(x, 2).mean.dtype == chain.sample(3, seed=0).dtype == torch.float32
    paths = sc.simulate(problem, 64, control=exact.control, time_steps=10, seed=0)
    assert paths.states.dtype == torch.float32
    twin = sc.ControlProblem(sde, sc.Dirac(torch.zeros(1)), (lambda x: net.double()(x)[:, 0]) if module else bumps)
    assert float(exact.log_z) == pytest.approx(float(sc.exact_solution(twin).log_z), abs=1e-5)


def test_a_law_on_a_grid():
    x = torch.linspace(-8, 8, 401)
    densities = [
        (-0.5 * (x - m) ** 2 / s**2).exp() / (s * math.sqrt(2 * math.pi)) for m, s in ((0.5, 1.0), (-1.0, 0.3))
    ]
    law = GridLaw([-8.0, -8.0], [0.04, 0.04], densities, torch.zeros(()))
    want = sc.Gaussian(torch.tensor([0.5, -1.0]), torch.tensor([1.0, 0.09]))
    close(law.mean, want.mean)
    close(law.variance, want.variance)
    y = want.mean + randn(5, 2, seed=0) * 0.3
    close(law.log_prob(y), want.log_prob(y), 1e-9)
    assert law.log_prob(torch.tensor([[9.0, 0.0]])) == -torch.inf
    torch.manual_seed(0)
    sample = law.sample((20_000,))
    for i in range(2):
        order = sample[:, i].sort().values
        gap = (
            (
                torch.distributions.Normal(want.mean[i], want.variance[i] ** 0.5).cdf(order)
                - torch.linspace(0, 1, 20_000)
            )
            .abs()
            .max()
        )
        assert float(gap) < 1.95 / 20_000**0.5  # Kolmogorov-Smirnov at 1e-3


def test_where_an_equation_is_not_solved_the_reason_is_true():
    """A bounded reward has no infinite expectation: noise in one of two directions is what central differences fail
    on."""
    drift = lambda x, t: torch.stack([x[:, 1], -9.81 * torch.sin(x[:, 0]) - 0.1 * x[:, 1]], 1)  # noqa: E731
    pendulum = sc.ControlProblem(
        sc.SDE(drift, torch.tensor([[0.0], [2.0]]), dim=2, horizon=3.0),
        sc.Dirac(torch.zeros(2)),
        lambda x: -10 * (1 + torch.cos(x[:, 0])) - 0.5 * x[:, 1] ** 2,
        alpha=0.5,
    )
    with pytest.raises(sc.NoExactSolution, match=r"noise does not act in all directions.*TemperedSMC") as caught:
        sc.exact_solution(pendulum)
    assert "infinite" not in str(caught.value)
    with pytest.raises(sc.NoExactSolution, match="infinite"):  # E exp(X^2) at a variance of 1
        GridSolution(ou(lambda x: 2.0 * x[..., 0] ** 2 + 0.1 * x[..., 0].sin(), alpha=0.5, horizon=2.0))


def test_steps_too_long_for_the_drift_are_named():
    """Of a steep double well Euler steps of 1/40 are, where noise takes paths far out."""
    problem = sc.library.named_problem("double-well-1d")
    with pytest.raises(sc.NoExactSolution, match=r"drift.*run away.*Use more time steps"):
        sc.exact_solution(problem, time_steps=40)
