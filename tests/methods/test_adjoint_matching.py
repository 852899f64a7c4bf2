"""Adjoint matching and SOCM: targets, their means and their variance, against closed forms and automatic
differentiation."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from cases import F64, SmallControl, nonlinear, randn, random_lq

import sdecontrol as sc
from sdecontrol.chains.shifts import shift_function, shifts_along
from sdecontrol.methods.base import Run
from sdecontrol.methods.reciprocal import clipped
from sdecontrol.methods.regression import RegressionState, longest_residuals, regress
from sdecontrol.methods.socm import SOCM, SOCMState, inverse_transposed
from sdecontrol.paths.closed_loop import ClosedLoop
from sdecontrol.paths.integrator import integrate
from sdecontrol.paths.lean_adjoint import StepJacobians, lean_targets, own_noise, running_cost_gradients
from sdecontrol.paths.paths import Record
from sdecontrol.problems.slope import reward_slope
from sdecontrol.randomness import SeededNoise


def paths_of(problem, chain, control, n, seed=0):
    noise = SeededNoise(seed, n, chain.steps, chain.noise_shape, dtype=F64, device=torch.device("cpu"))
    x0 = problem.draw_start(n, seed)
    shift = None if control is None else shift_function(chain, control)
    with torch.no_grad():
        return integrate(chain, x0, noise, shift, running_cost=problem.running_cost_or_none)


def fitted(paths):
    loop = ClosedLoop(paths.chain)
    loop.fit(paths, StepJacobians(paths).scales)
    return loop


def targets_of(problem, paths, control=None, *, zero_variance=False, **options):
    """The lean targets and the shifts they are for; ``control`` on the right side only where noise is subtracted."""
    _, slope = reward_slope(problem, paths)
    jacobians = StepJacobians(paths)
    part = None
    if zero_variance:
        states = paths.states[:-1].detach().requires_grad_(True)
        shifts = shifts_along(paths.chain, control, states)
        part, _ = own_noise(jacobians, states, shifts, ClosedLoop(paths.chain), tolerance=1e-12, most=60)
    return lean_targets(
        jacobians,
        slope,
        costs=running_cost_gradients(paths, problem.running_cost_or_none),
        alpha=problem.alpha,
        noise_part=part,
        **options,
    )


def image_problem():
    """States of another rank, so that the Jacobians stay graphs."""

    def drift(x, t):
        return torch.sin(x).flip(2) - t * x**3

    return sc.ControlProblem(
        sc.SDE(drift, torch.tensor(0.5, dtype=F64), shape=(1, 2, 3)),
        initial=sc.Dirac(0.3 * torch.ones(1, 2, 3, dtype=F64)),
        reward=lambda x: torch.cos(x).flatten(1).sum(1),
        running_cost=lambda x, t: (t * x**2).flatten(1).sum(1),
        alpha=0.8,
    )


LEAN = {
    "linear": lambda: random_lq(3, m=4, seed=2),
    "controlled start": lambda: random_lq(2, seed=3, start="controlled"),
    "diffusion of x": nonlinear,
    "images": image_problem,
}


@pytest.mark.parametrize("name", LEAN)
def test_the_lean_adjoint_is_the_gradient_of_the_total_reward(name):
    problem = LEAN[name]()
    chain = problem.chain(6)
    paths = paths_of(problem, chain, None, 5)
    shifts = 0.3 * randn(*paths.shifts.shape, seed=1)
    x = problem.draw_start(5, 0).clone().requires_grad_(True)
    states, total = [x], 0.0
    for k in range(chain.steps):
        if problem.running_cost_or_none is not None and chain.clock[k] >= 0:
            total = total - chain.step_sizes[k] * problem.running_cost(states[-1], chain.times[k])
        after = chain.step(k, states[-1], paths.noises[k], shifts[k])
        after.retain_grad()
        states.append(after)
    ((total + problem.reward(chain.decode(states[-1]))) / problem.alpha).sum().backward()
    record = Record(torch.stack(states).detach(), paths.noises, shifts)
    held = dataclasses.replace(paths, end=states[-1].detach(), record=record)
    got = targets_of(problem, held)
    jacobians = StepJacobians(held)
    want = torch.stack([jacobians.scale_transposed(k, states[k + 1].grad) for k in range(chain.steps)])
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    before = targets_of(problem, held, own_step=False)
    want = torch.stack([jacobians.scale_transposed(k, states[k].grad) for k in range(chain.steps)])
    torch.testing.assert_close(before, want, rtol=1e-11, atol=1e-12)


EXACT = [
    ({"d": 3, "m": 2}, "euler"),
    ({"d": 3, "m": 4}, "euler"),
    ({"d": 3, "m": 3, "start": "fixed"}, "euler"),
    ({"d": 3, "m": 3, "start": "controlled"}, "euler"),
    ({"d": 3, "m": 3}, "exact"),
]


@pytest.mark.parametrize(("shape", "scheme"), EXACT)
def test_at_a_linear_quadratic_optimum_every_target_is_the_control(shape, scheme):
    """No variance is left, and the pairing with a_{k+1} makes the chain's own optimum the fixed point."""
    problem = random_lq(seed=5, **shape)
    exact = sc.exact_solution(problem, time_steps=12, scheme=scheme)
    paths = paths_of(problem, exact.chain, exact.control, 64)
    affine = Affine(exact, paths)
    got = targets_of(problem, paths, affine, zero_variance=True)
    torch.testing.assert_close(got, paths.shifts, rtol=1e-8, atol=1e-9)
    plain = targets_of(problem, paths)
    noise = float((plain - paths.shifts).square().mean())
    assert float((got - paths.shifts).square().mean()) < 1e-14 * noise
    other = targets_of(problem, paths, affine, zero_variance=True, own_step=False)
    assert (
        float((other - paths.shifts).square().mean()) > 1e-6 * noise
    )  # the continuous pairing has another fixed point


class Affine:
    """The exact control as an affine map per step, with a graph."""

    def __init__(self, exact, paths):
        chain = exact.chain
        shift = exact.control.on_chain(chain)
        d = chain.event_shape[0]
        zero, eye = torch.zeros(1, d, dtype=F64), torch.eye(d, dtype=F64)
        self.offset = [shift(k, zero, None) for k in range(chain.steps)]
        self.matrix = [shift(k, eye, None) - self.offset[k] for k in range(chain.steps)]

    def along(self, chain, states, y=None, first=0):
        return torch.stack([x @ self.matrix[k] + self.offset[k] for k, x in enumerate(states)])


@pytest.mark.slow
@pytest.mark.parametrize("make", [nonlinear, lambda: random_lq(2, seed=4)], ids=["nonlinear", "linear"])
def test_subtracting_the_own_noise_changes_no_mean(make):
    """E[phi(x_k) target] is the same with and without, for any control: 4 standard errors of the paired difference,
    whose size is 1 % of the targets'. A diffusion that depends on x has the second-order trap (noise times noise)."""
    problem = make()
    chain = problem.chain(6)
    control = SmallControl(2, problem.control_shape[0])
    paths = paths_of(problem, chain, control, 50_000, seed=7)
    plain = targets_of(problem, paths)
    less = targets_of(problem, paths, control, zero_variance=True)
    difference = plain - less
    assert float(difference.square().mean()) > 1e-3 * float(plain.square().mean())  # something was subtracted
    for phi in (
        torch.ones_like(paths.states[:-1, :, :1]),
        paths.states[:-1, :, :1],
        torch.sin(paths.states[:-1, :, 1:]),
    ):
        mean = (phi * difference).mean(1)
        error = (phi * difference).std(1) / difference.shape[1] ** 0.5
        assert float(error.max()) < 0.01 * float(plain.square().mean() ** 0.5)
        assert bool((mean.abs() < 4.5 * error + 1e-12).all()), (mean / error).abs().max()


def test_own_noise_solves_its_linear_systems():
    problem = nonlinear()
    chain, control = problem.chain(16), SmallControl(2, 3)
    paths = paths_of(problem, chain, control, 6)  # too few paths for a fit: the plain iteration
    jacobians = StepJacobians(paths)
    states = paths.states[:-1].detach().requires_grad_(True)
    shifts = shifts_along(chain, control, states)
    z, _ = own_noise(jacobians, states, shifts, ClosedLoop(chain), tolerance=1e-13, most=200)
    scales = [chain.kernel(k, x)[1] for k, x in enumerate(paths.states[:-1])]

    def shift_at(k, x):
        return shift_function(chain, control)(k, x[None], None)[0]

    def mean_at(k, c, x):
        mean, scale = chain.kernel(k, x[None])
        return (mean + (scale @ c)[..., 0])[0]

    for k in (0, 7, 15):
        for b in range(3):
            c = paths.shifts[k, b, :, None]
            x = paths.states[k, b]
            C = torch.autograd.functional.jacobian(partial(shift_at, k), x)
            J = torch.autograd.functional.jacobian(partial(mean_at, k, c), x) + scales[k][b] @ C
            torch.testing.assert_close(J.mT @ z[k, b], C.mT @ paths.noises[k, b], rtol=1e-9, atol=1e-10)


def affine_optimum():
    """Paths of a linear-quadratic optimum, their states as a leaf, and the shifts there with their graph."""
    problem = random_lq(3, seed=5, start="fixed")
    exact = sc.exact_solution(problem, time_steps=12)
    paths = paths_of(problem, exact.chain, exact.control, 256)
    states = paths.states[:-1].detach().requires_grad_(True)
    shifts = shifts_along(exact.chain, Affine(exact, paths), states)
    return paths, states, shifts


def test_the_first_guess_at_the_own_noise_is_exact_where_everything_is_affine():
    paths, states, shifts = affine_optimum()
    jacobians, loop = StepJacobians(paths), fitted(paths)
    guess, _ = own_noise(jacobians, states, shifts, loop, tolerance=0.0, most=0)
    whole, first = own_noise(jacobians, states, shifts, loop, tolerance=1e-12, most=60)
    torch.testing.assert_close(guess, whole, rtol=1e-4, atol=1e-5)
    assert first < 1e-4


def test_the_closed_loop_is_fitted_anew_only_where_its_guess_will_not_do():
    paths, states, shifts = affine_optimum()
    jacobians, loop, want = StepJacobians(paths), ClosedLoop(paths.chain), fitted(paths).moves
    _, first = own_noise(jacobians, states, shifts, loop, tolerance=1e-3, most=8)
    assert first > 0.1 and torch.equal(loop.moves, want)  # the identity was no guess
    loop.moves *= 1.0001
    kept = loop.moves.clone()
    _, second = own_noise(jacobians, states, shifts, loop, tolerance=1e-2, most=8)
    assert 0 < second < 1e-3 and torch.equal(loop.moves, kept)
    own_noise(jacobians, states, shifts, loop, tolerance=1e-9, most=8)
    assert torch.equal(loop.moves, want)


# ---------------------------------------------------------------- SOCM


def socm_targets(problem, chain, paths, kind, seed=0):
    method = SOCM(matrices=kind)
    state = SOCMState(Run(problem, chain, 64, 1, 0), kind)
    if state.slopes is not None:
        with torch.no_grad():
            state.slopes += 0.4 * randn(*state.slopes.shape, seed=seed)
    _, slope = reward_slope(problem, paths)
    costs = running_cost_gradients(paths, problem.running_cost_or_none)
    if state.loop is not None:
        state.loop.fit(paths, StepJacobians(paths).scales)
    with torch.no_grad():
        return method.targets(state, StepJacobians(paths), slope, costs, problem.alpha)


@pytest.mark.parametrize("kind", ["identity", "full", "diagonal", "scalar", "adjoint", "closed-loop"])
def test_weighted_socm_targets_have_the_soft_optimal_mean_for_any_matrices(kind):
    """At the start point, from paths of a wrong control: E[w y]/E[w] is the mean shift of p*, within 4.5 standard
    errors, which are below 1 % of its size."""
    problem = random_lq(2, seed=1, alpha=2.0)
    exact = sc.exact_solution(problem, time_steps=5)
    control = SmallControl(2, 2)
    paths = paths_of(problem, exact.chain, control, 100_000, seed=3)
    y = socm_targets(problem, exact.chain, paths, kind)[0]
    log_w = (problem.reward(paths.end) - paths.running_cost) / problem.alpha - paths.log_ratio()
    if (
        kind == "closed-loop"
    ):  # what is subtracted has a mean under the weights, which vanishes at the fixed point: not for this test
        jacobians = StepJacobians(paths)
        noises = inverse_transposed(jacobians, paths.noises)
        own = noises - fitted(paths).inverse_transposed(jacobians.mean_products(noises))
        y = y + jacobians.scale_transposed(0, own[0])
    w = (log_w - log_w.max()).exp()[:, None]
    mean = (w * y).sum(0) / w.sum()
    error = ((w * (y - mean)).square().sum(0).sqrt()) / w.sum()
    x0 = problem.initial.mean[None]
    want = exact.chain.shift_at(0, x0, exact.control(x0, 0.0))[0]
    assert float(error.max()) < 0.02 * float(want.norm())
    assert bool(((mean - want).abs() < 4.5 * error).all()), ((mean - want) / error).tolist()


def test_closed_loop_matrices_leave_no_variance_at_a_linear_quadratic_optimum():
    problem = random_lq(3, seed=5, start="fixed")  # from a point the first step's closed loop cannot be seen
    exact = sc.exact_solution(problem, time_steps=12)
    paths = paths_of(problem, exact.chain, exact.control, 256)
    y = socm_targets(problem, exact.chain, paths, "closed-loop")
    plain = targets_of(problem, paths)
    left, before = (float((v - paths.shifts).square().mean()) for v in (y, plain))
    assert left < 1e-6 * before  # the fit has a ridge


@pytest.mark.filterwarnings("ignore:socm. only:RuntimeWarning")
def test_a_path_without_weight_is_half_a_path_of_socms_regression():
    """The reward is far from nearly all of them, and their weights 0."""
    problem = sc.ControlProblem(
        sc.BrownianMotion(dim=2), sc.Dirac(torch.zeros(2)), reward=lambda x: -1e3 * (x - 1).square().sum(1)
    )
    run, seen = Run(problem, problem.chain(4), 64, 2, 0, SmallControl(2, 2, dtype=torch.float32)), []
    method = SOCM(trust_region=None)
    run.descend = lambda regression: seen.append(regression.weights) is None
    method.step(method.setup(run), run)
    assert len(seen[0]) == 128 and float(seen[0].mean()) == pytest.approx(1.0)
    assert float(seen[0].min()) == pytest.approx(0.5) and float(seen[0].median()) == pytest.approx(0.5)


def test_unweighted_socm_with_the_references_jacobians_is_plain_adjoint_matching():
    """One of the classes of equal expected gradients: here the targets are the same path by path."""
    problem = random_lq(2, seed=6)
    chain = problem.chain(7)
    paths = paths_of(problem, chain, SmallControl(2, 2), 16)
    torch.testing.assert_close(socm_targets(problem, chain, paths, "adjoint"), targets_of(problem, paths))


def test_unweighted_socm_with_the_closed_loops_jacobians_has_the_gradient_of_reward_backpropagation():
    """The other class: with N_j the Jacobian of the controlled step along the path, E[d c . (c - y)] is the gradient of
    -J/alpha, on any problem; here through the fitted closed loop of an affine control, which is exact. Paired
    differences, 4.5 standard errors."""
    from gaussian_gradients import GaussianChain, gradient_of, perturbed

    problem = random_lq(2, seed=1, running=True)
    chain = problem.chain(4)
    exact = GaussianChain(problem, 4)
    control = perturbed(exact.optimum(), 0.2)
    paths = paths_of(problem, chain, control, 100_000, seed=5)
    y = socm_targets(problem, chain, paths, "closed-loop")
    want = gradient_of(exact.cost(control), control)
    root, count = exact.root, paths.end.shape[0]
    left = (paths.shifts - y) * root
    x = paths.states[:-1]
    gain = torch.einsum("kbi,kbj->kij", left, x) / count
    have = torch.cat([gain.flatten(), left.mean(1).flatten()])
    square = torch.einsum("kbi,kbj->kij", left**2, x**2) / count
    error = (torch.cat([square.flatten(), (left**2).mean(1).flatten()]) / count).sqrt()
    assert float(error.norm()) < 0.02 * float(want.norm())
    assert bool(((have - want).abs() < 4.5 * error + 1e-4 * want.abs().max()).all())


# ---------------------------------------------------------------- through solve


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "bar"),
    [
        pytest.param(sc.AdjointMatching(), 1e-6, id="adjoint-matching"),
        pytest.param(
            sc.AdjointMatching(zero_variance=False), 3e-3, id="adjoint-matching, with its noise", marks=pytest.mark.slow
        ),
        pytest.param(sc.AdjointMatching(steps=6), 1e-6, id="adjoint-matching, some steps", marks=pytest.mark.slow),
        # seeds 0, 1 and 2 give 0.053, 0.034 and 0.040
        pytest.param(
            sc.AdjointMatching(reciprocal=True), 1e-1, id="adjoint-matching, reciprocal", marks=pytest.mark.slow
        ),
        pytest.param(sc.SOCM(), 1e-6, id="socm"),
        pytest.param(sc.SOCM(matrices="full"), 3e-3, id="socm, full", marks=pytest.mark.slow),
        pytest.param(sc.SOCM(weighted=False), 1e-6, id="socm, unweighted", marks=pytest.mark.slow),
    ],
)
def test_default_training_reaches_the_linear_quadratic_optimum(method, bar):
    running = not getattr(method, "reciprocal", False)
    problem = random_lq(2, seed=8, running=running)
    # the reciprocal form needs longer: its targets are noisier
    iterations = 100 if running else 400
    solution = sc.solve(problem, method, time_steps=8, iterations=iterations, batch_size=128, seed=0)
    exact = sc.exact_solution(problem, like=solution)
    assert sc.control_error(solution, exact, n=1024).relative.value < bar


@pytest.mark.slow
def test_a_controlled_start_is_learned_too():
    problem = random_lq(2, seed=9, start="controlled")
    solution = sc.solve(problem, sc.AdjointMatching(), time_steps=8, iterations=100, batch_size=128, seed=0)
    exact = sc.exact_solution(problem, like=solution)
    gap = solution.evaluate(4096, seed=1).gap
    assert abs(gap.value - float(exact.floor)) < 4 * gap.stderr + 1e-6


@pytest.mark.slow
def test_a_nonlinear_problem_of_plain_functions_is_solved_with_defaults():
    """A double well whose exact chain is known from a grid (relative error 0.009 measured)."""

    def drift(x, t):
        return -4 * x * (x**2 - 1)

    problem = sc.ControlProblem(
        sc.SDE(drift, torch.tensor(1.0, dtype=F64), dim=1),
        initial=sc.Dirac(torch.zeros(1, dtype=F64)),
        reward=lambda x: -2 * (x[:, 0] ** 2 - 1) ** 2 + 0.5 * x[:, 0],
        alpha=1.0,
    )
    solution = sc.solve(problem, "adjoint-matching", time_steps=50, iterations=200, batch_size=128, seed=0)
    exact = sc.exact_solution(problem, like=solution)
    assert sc.control_error(solution, exact).relative.value < 0.02


@pytest.mark.parametrize(
    "method",
    [sc.AdjointMatching(), sc.AdjointMatching(reciprocal=True), sc.SOCM("full")],
    ids=["adjoint-matching", "reciprocal", "socm"],
)
def test_a_resumed_run_goes_on_to_the_same_numbers(tmp_path, method):
    problem = random_lq(2, seed=8, running=False)
    options = {"time_steps": 5, "batch_size": 64, "seed": 0, "iterations": 23}
    whole = sc.solve(problem, method, **options)

    class Stop:
        def on_step_end(self, state):
            if state.iteration == 12:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sc.solve(problem, method, checkpoint_dir=tmp_path, checkpoint_every=5, callbacks=[Stop()], **options)
    again = sc.solve(problem, method, checkpoint_dir=tmp_path, checkpoint_every=5, resume=True, **options)
    for a, b in zip(whole.control.state_dict().values(), again.control.state_dict().values()):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- outliers


def test_residuals_beyond_the_longest_count_linearly_and_those_that_are_no_numbers_not_at_all():
    """The gradient in a shift is the residual, cut to the step's length; with a path's weight, times that."""
    problem = random_lq(2, seed=1)
    chain = problem.chain(3)
    run = Run(problem, chain, 5, 1, 0)
    state = RegressionState(run)
    state.least_squares = True  # steps have weight 1 until residuals have been observed
    state.shifts = shifts = torch.nn.Parameter(torch.zeros(3, 5, 2, dtype=F64))
    targets = randn(3, 5, 2, seed=2)
    targets[0, 1], targets[1, 3], targets[2, 0], targets[2, 4] = 1e9, -50.0, math.inf, math.nan
    most = torch.tensor([3.0, 7.0, 100.0], dtype=F64)
    weights = torch.linspace(0.5, 1.5, 5, dtype=F64)
    means = regress(state, run, shifts, targets, weights=weights, most=most)
    want = -targets.where(targets.isfinite(), 0.0)
    size = want.norm(dim=2, keepdim=True)
    want = want * (most.reshape(3, 1, 1) / size.clamp(min=1e-9)).clamp(max=1.0)
    torch.testing.assert_close(shifts.grad, want * weights[:, None] / 5, rtol=1e-12, atol=1e-12)
    far, length = most[:, None], size[..., 0]
    squares = torch.where(
        length > far, far * length - 0.5 * far**2, 0.5 * length**2
    )  # Huber's function, continuous at the bound
    torch.testing.assert_close(means, (squares * weights).mean(1), rtol=1e-12, atol=1e-12)


def longest_on(problem, steps, paths, control=None, times=10.0):
    chain = problem.chain(steps)
    paths = paths_of(problem, chain, control, paths)
    _, slope = reward_slope(problem, paths)
    jacobians, costs = StepJacobians(paths), running_cost_gradients(paths, problem.running_cost_or_none)
    targets = lean_targets(jacobians, slope, costs=costs, alpha=problem.alpha)
    residuals = paths.shifts - targets
    return residuals.norm(dim=2), longest_residuals(residuals, jacobians, slope, costs, problem.alpha, times), targets


@pytest.mark.parametrize("start", ["fixed", "controlled"])
def test_light_tails_have_no_outliers(start):
    """On linear-quadratic chains nothing is cut: their fixed point stays the optimum."""
    for seed in range(5):
        sizes, longest, _ = longest_on(random_lq(2, m=3, seed=seed, start=start), 6, 2048)
        assert bool((sizes < longest.unsqueeze(1)).all())


@pytest.mark.parametrize("where", ["reward", "running cost"])
def test_what_few_paths_meet_is_no_outlier(where):
    """The gradient of one path in a hundred is not zero: the median of all residuals is, and would throw the signal
    away."""
    bump = lambda x: 50 * torch.relu(x[:, 0] - 2.3)  # noqa: E731
    parts = {"reward": bump} if where == "reward" else {"running_cost": lambda x, t: -bump(x)}
    problem = sc.ControlProblem(
        sc.SDE(lambda x, t: -0.1 * torch.sin(x), torch.tensor(1.0, dtype=F64), dim=2),
        initial=sc.Dirac(torch.zeros(2, dtype=F64)),
        **parts,
    )
    sizes, longest, targets = longest_on(problem, 10, 4096)
    met = (targets[-2] != 0).any(1)
    assert 0 < float(met.double().mean()) < 0.02
    assert float(sizes.median(1).values.max()) == 0.0
    assert float((sizes / longest.unsqueeze(1)).max()) < 1.15  # the drift alone makes it grow by a tenth


def test_an_adjoint_that_has_grown_on_a_ridge_is_an_outlier():
    """Paths that begin within 1e-3 of 0 are a hundred times as far apart at the end, the others hardly further than
    they began."""
    problem = sc.ControlProblem(
        sc.SDE(lambda x, t: 2 * torch.tanh(10 * x), torch.tensor(0.005, dtype=F64), dim=1),
        initial=sc.Gaussian(torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)),
        reward=lambda x: x.sum(1),
    )
    sizes, longest, _ = longest_on(problem, 100, 4096)
    far = (sizes > longest.unsqueeze(1)).double().mean(1)
    assert 0 < float(far.max()) < 0.02
    assert float((sizes.amax(1) / longest).max()) > 3
    assert longest_on(problem, 100, 64, times=None)[1] is None


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("method", [sc.AdjointMatching(), sc.SOCM()], ids=lambda m: m.name)
def test_a_model_of_many_modes_is_tuned_with_defaults(method, seed):
    """Adjoints on the ridges between 25 modes reach 1e8 times the usual: adjoint matching does not come near without
    bounds, nor without taking steps back. Where features that cancel on the batch are told apart, one path in a
    thousand runs away; where lost paths have no weight, SOCM leaves two in a hundred at other modes."""
    problem = sc.library.mixture_inverse_problem(4, 1)
    solution = sc.solve(problem, method, iterations=60, time_steps=50, batch_size=256, seed=seed, progress=False)
    assert solution.evaluate(2048, seed=1).elbo.value > float(sc.exact_solution(problem).log_z) - 5


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_path_gone_far_does_not_spoil_the_fit_of_the_closed_loop(dtype):
    """Without weights its slopes would be that path's own alone; on an affine chain weights change nothing."""
    problem = sc.ControlProblem(
        sc.SDE(lambda x, t: -torch.tanh(x), 1.0, dim=2),
        initial=sc.Gaussian(torch.zeros(2, dtype=dtype), torch.eye(2, dtype=dtype)),
        reward=lambda x: -(x * x).sum(1),
    )
    paths = sc.simulate(problem, 4096, time_steps=5, seed=1)
    before = fitted(paths).moves
    states = paths.states.clone()
    states[:, 0] = 1e7
    record = dataclasses.replace(paths.record, states=states)
    after = fitted(dataclasses.replace(paths, record=record)).moves
    assert float((after - before).abs().max()) < 0.02 * float(before.abs().max())
    linear = random_lq(2, seed=1, running=False)
    paths = paths_of(linear, linear.chain(5), None, 256)
    want = linear.chain(5).linear_steps[0] - torch.eye(2, dtype=F64)
    torch.testing.assert_close(fitted(paths).moves[1:], want[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("moving", [False, True])
def test_a_quadratic_cost_along_paths_and_its_gradients_are_those_step_by_step(moving):
    """In closed form in one call, and by autograd through a plain function that hides it."""
    root = randn(2, 2, seed=4)
    matrix = root @ root.mT
    cost = sc.QuadraticCost((lambda t: (1 + t) * matrix.to(t)) if moving else matrix)
    problem = random_lq(2, seed=1)
    paths = paths_of(problem, problem.chain(5), None, 16)
    states, times = paths.states[:-1], paths.times[:-1]
    want = torch.stack([cost(x, t) for x, t in zip(states, times)])
    torch.testing.assert_close(cost.along(states, times), want, rtol=1e-12, atol=1e-12)
    plain = running_cost_gradients(paths, lambda x, t, y: cost(x, t))
    torch.testing.assert_close(running_cost_gradients(paths, cost), plain, rtol=1e-12, atol=1e-12)
    assert float(plain.abs().min()) > 0


def test_steep_slopes_are_shortened_and_others_left_alone():
    """The reciprocal form on a density: no slope beyond ``clip`` usual ones, directions kept, what is not finite counts
    for nothing; elsewhere none is touched."""
    scale = torch.tensor([0.5, 2.0])
    problem = sc.gibbs_problem(lambda x: -0.5 * x.square().sum(1), 2, "brownian", scale=scale)
    bound = 3.0 * problem.roughness * 2**0.5
    slope = torch.tensor([[0.1, -0.2], [1e5, 1e5], [math.inf, 0.0], [math.nan, 1.0]])
    method = sc.AdjointMatching(reciprocal=True, clip=3.0)
    found = clipped(problem, slope, method.clip)
    assert torch.equal(found[0], slope[0]) and not bool(found[2:].any())
    assert abs(float((scale * found[1]).norm()) - bound) < 1e-4 * bound
    assert torch.allclose(found[1] / found[1].norm(), slope[1] / slope[1].norm())
    plain = random_lq(2, seed=1, running=False)
    assert clipped(plain, slope, method.clip) is slope
    assert clipped(problem, slope, None) is slope
    for clip in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="clip"):
            sc.AdjointMatching(clip=clip)


def test_adjoint_sampling_of_a_steep_density_stays_finite():
    """``exp(-10 x^8)``: its score at the ends of the first paths is a thousand times its usual size; with slopes as
    they are the gradient overflows."""
    problem = sc.gibbs_problem(lambda x: -10 * (x**8).sum(1), 3, "brownian", seed=0)
    method = sc.AdjointMatching(reciprocal=True, buffer_size=512)
    found = sc.solve(problem, method, time_steps=20, iterations=60, batch_size=128, seed=0).evaluate(2048, seed=1)
    exact = 3 * math.log(2 * math.gamma(9 / 8) / 10 ** (1 / 8))
    assert exact - 0.6 < found.elbo.value < exact + 3 * found.elbo.stderr


def test_refusals_name_the_reason():
    black_box = sc.ControlProblem(
        sc.BrownianMotion(2), sc.Dirac(torch.zeros(2)), lambda x: (x.detach() > 0).float().sum(1), alpha=1.0
    )
    for method in ("adjoint-matching", "socm"):
        with pytest.raises(sc.NotDifferentiable, match=f"{method} needs gradients, but reward has .*returns a tensor"):
            sc.solve(black_box, method, iterations=1)
    with pytest.raises(ValueError, match="without running cost"):
        sc.solve(random_lq(2), sc.AdjointMatching(reciprocal=True), iterations=1)
    with pytest.raises(ValueError, match="bridges in closed form need a linear reference"):
        problem = sc.ControlProblem(
            sc.SDE(lambda x, t: -(x**3), torch.tensor(1.0), dim=1),
            sc.Dirac(torch.zeros(1)),
            lambda x: x[:, 0],
            alpha=1.0,
        )
        sc.solve(problem, sc.AdjointMatching(reciprocal=True), iterations=1)
    with pytest.raises(ValueError, match="as many noises as states"):
        sc.solve(random_lq(2, m=3), "socm", iterations=1)
    with pytest.raises(ValueError, match="does not depend on x"):
        problem = sc.ControlProblem(
            sc.SDE(lambda x, t: -x, lambda x, t: 1 + 0.1 * x**2, dim=1),
            sc.Dirac(torch.zeros(1)),
            lambda x: x[:, 0],
            alpha=1.0,
        )
        sc.solve(problem, "socm", iterations=1, time_steps=5)
    with pytest.raises(ValueError, match="pairing"):
        sc.AdjointMatching(pairing="chian")
    with pytest.raises(ValueError, match="matrices"):
        sc.SOCM(matrices="dense")
