"""Tempered particles: unbiased Z on a fixed ladder, moves that keep their law, states and noises, against closed
forms."""

import itertools
import math

import pytest
import torch
from cases import F64, nonlinear, randn, random_lq, slow_but, spd

import sdecontrol as sc
from sdecontrol.evaluation.estimates import mean_estimate
from sdecontrol.evaluation.evaluate import log_weights
from sdecontrol.particles.ascent import adapt, ancestral_variance
from sdecontrol.particles.tempering import (
    Component,
    Fitted,
    Kernel,
    NoiseTarget,
    Points,
    StateTarget,
    fit_gaussian,
    points_at,
    run_tempered,
    start_points,
)
from sdecontrol.processes.laws import GaussianMixture, ProductMixture


def close(estimate, truth, most):
    """Within 4 standard errors, which are at most ``most``."""
    assert estimate.stderr < most, estimate
    assert abs(estimate.value - float(truth)) < 4 * estimate.stderr + 1e-9, (estimate, float(truth))


def two_wells(x):
    """Unequal wells at -1.5 and 1.5, narrow and correlated; log Z = log 3."""
    a = torch.distributions.MultivariateNormal(
        torch.tensor([-1.5, 0.0], dtype=x.dtype), 0.2 * torch.eye(2, dtype=x.dtype)
    )
    cov = torch.tensor([[0.3, 0.2], [0.2, 0.4]], dtype=x.dtype)
    b = torch.distributions.MultivariateNormal(torch.tensor([1.5, 0.5], dtype=x.dtype), cov)
    return torch.logaddexp(a.log_prob(x), math.log(2) + b.log_prob(x))


def wells(smooth=True):
    return StateTarget(two_wells, torch.zeros(2, dtype=F64), torch.full((2,), 2.0, dtype=F64), smooth)


@pytest.mark.parametrize("smooth", [True, False])
def test_z_is_unbiased_on_a_fixed_ladder(smooth):
    """E Z^ = Z and E[Z^ sum_i W_i x_i] = Z E x for 16 particles a system. A dropped increment, weights not reset after
    resampling, or a move that does not keep its law shifts one or the other by far more than four standard errors."""
    target = wells(smooth)
    ladder, _ = adapt(target, 256, 0)
    assert len(ladder) > 2 and float(ladder.betas[-1]) == 1.0 and bool((ladder.betas.diff() > 0).all())
    found = run_tempered(target, ladder, 6000, 16, 1)
    relative = (found.log_z - math.log(3)).exp()
    close(mean_estimate(relative), 1.0, 0.015)
    assert float(relative.std()) > 0.1  # else there was nothing to test
    means = relative.unsqueeze(1) * (found.log_weights.exp().unsqueeze(2) * target.states(found.z)).sum(1)
    for mean, truth in zip(means.T, (0.5, 1 / 3)):
        close(mean_estimate(mean), truth, 0.025)


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_moves_keep_their_law(smooth, beta):
    """Exact draws of N(0, I) exp(beta phi), for phi with a Gaussian product, have its moments after moves with a badly
    fitted Gaussian."""
    cov, mean = spd(3, 3), randn(3, seed=4)
    law = torch.distributions.MultivariateNormal(mean, cov)
    target = StateTarget(law.log_prob, torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64), smooth)
    precision = (1 - beta) * torch.eye(3, dtype=F64) + beta * torch.linalg.inv(cov)
    mixed = torch.linalg.inv(precision)
    centre = mixed @ (beta * torch.linalg.inv(cov) @ mean)
    root = torch.linalg.cholesky(mixed)
    n = 40_000
    p = points_at(target, centre + randn(n, 3, seed=5) @ root.T, torch.zeros(n, 0, dtype=F64))
    began = p.z
    kernel = Kernel(beta, 0.5 * randn(3, seed=6), 1.3 * torch.linalg.cholesky(spd(3, 7)), 3 if smooth else 1)
    generator = torch.Generator().manual_seed(8)
    for _ in range(6):
        p, accept = kernel.move(target, p, 0.9, generator)
    assert 0.1 < float(accept.double().mean()) < 0.999  # rejections happen, and moves too
    assert float((began - p.z).abs().mean()) > 0.1
    standard = torch.linalg.solve_triangular(root, (p.z - centre).T, upper=False).T
    for i in range(3):
        close(mean_estimate(standard[:, i]), 0.0, 0.02)
        for j in range(i + 1):
            close(mean_estimate(standard[:, i] * standard[:, j]), float(i == j), 0.02)


def test_moves_on_a_fitted_gaussian_are_never_rejected():
    """Where the target is the Gaussian that was fitted, the split flow has no error at any step size: the kicks vanish.
    A kick of the wrong size or sign leaves the law alone, and shows here."""
    cov, mean = spd(4, 3), randn(4, seed=4)
    law = torch.distributions.MultivariateNormal(mean, cov)
    scale = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=F64)
    target = StateTarget(law.log_prob, randn(4, seed=5), scale)
    p = points_at(target, randn(100, 4, seed=6), torch.zeros(100, 0, dtype=F64))
    root = torch.linalg.cholesky(cov / scale / scale.unsqueeze(1))
    kernel = Kernel(1.0, (mean - target.centre) / scale, root, 5)
    _, accept = kernel.move(target, p, 1.4, torch.Generator().manual_seed(0))
    assert bool(accept.all())
    mean, factor = fit_gaussian(randn(50_000, 4, seed=7) @ root.T, torch.full((50_000,), 1 / 50_000, dtype=F64))
    assert float((factor - root).abs().max()) < 0.03 and float(mean.abs().max()) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize(
    ("smooth", "start"),
    slow_but(
        list(itertools.product((True, False), ("dirac", "fixed", "controlled"))),
        *((True, "controlled"), (False, "dirac"), (False, "fixed")),
    ),
)
def test_noises_of_paths_have_the_chains_own_z_and_end(start, smooth):
    """In the space of noises the target is exact on the chain at K = 6, running cost and start included."""
    problem = random_lq(2, 3, seed=1, start=start, alpha=1.0)
    solution = sc.solve(problem, sc.TemperedSMC(64, gradient=smooth), time_steps=6, seed=0)
    exact = sc.exact_solution(problem, like=solution)
    found = solution.run(600, 1)
    relative = (found.log_z - exact.log_z).exp()
    close(mean_estimate(relative), 1.0, 0.03)
    means = relative.unsqueeze(1) * (found.log_weights.exp().unsqueeze(2) * found.end).sum(1)
    truth = exact.marginal(problem.horizon).mean if start != "fixed" else None
    if truth is not None:  # a fixed start keeps its law in the exact solution; particles tilt it
        for mean, value in zip(means.T, truth):
            close(mean_estimate(mean), value, 0.05)


@pytest.mark.slow
def test_a_control_moves_the_target_and_not_z():
    """phi = R/alpha - log dP^u/dQ0: the exact control leaves little to temper, any other one the same Z."""
    problem = random_lq(2, seed=1, alpha=0.7)
    plain = sc.solve(problem, sc.TemperedSMC(128), time_steps=8, seed=0)
    exact = sc.exact_solution(problem, time_steps=8)
    better = sc.solve(problem, sc.TemperedSMC(128, proposal=exact.control), time_steps=8, seed=0)
    worse = sc.solve(problem, sc.TemperedSMC(128, proposal=lambda x, t: 0.5 - 0.4 * x), time_steps=8, seed=0)
    spreads = []
    for solution in (plain, better, worse):
        log_z = solution.run(300, 1).log_z
        close(mean_estimate((log_z - exact.log_z).exp()), 1.0, 0.03)
        spreads.append(float(log_z.std()))
    assert spreads[1] < 0.5 * spreads[0], spreads


def test_nonlinear_paths_agree_with_particles_on_the_way():
    """log Z of a nonlinear problem with state-dependent noise: tempered noises against SMC, within 4 standard errors of
    both."""
    problem = nonlinear()
    tempered = sc.solve(problem, sc.TemperedSMC(256), time_steps=20, seed=0).evaluate(8192, seed=1).log_z
    other = sc.solve(problem, sc.SMC(256), time_steps=20, seed=0).evaluate(32768, seed=1).log_z
    assert abs(tempered.value - other.value) < 4 * math.hypot(tempered.stderr, other.stderr)
    assert tempered.stderr < 0.02 and other.stderr < 0.02


def test_a_gibbs_target_in_its_own_states():
    problem = sc.gibbs_problem(lambda x: two_wells(x.double()).float(), 2, seed=0)
    solution = sc.solve(problem, "tempered-smc", seed=0)
    evaluation = solution.evaluate(16384, seed=1)
    close(evaluation.log_z, math.log(3), 0.02)
    assert evaluation.reliable and solution.evaluations > 16384
    x = solution.sample(4000, seed=2)
    assert abs(float((x[:, 0] > 0).float().mean()) - 2 / 3) < 0.05
    x, log_w = solution.weighted_sample(4096, seed=3)
    assert abs(float(log_w.logsumexp(0)) - math.log(4096) - math.log(3)) < 0.1


def test_the_same_seed_and_a_saved_solution_give_the_same_samples(tmp_path):
    problem = sc.gibbs_problem(lambda x: -0.5 * x.square().sum(1), 2, scale=1.0)
    solution = sc.solve(problem, sc.TemperedSMC(128), seed=0)
    x = solution.sample(200, seed=1)
    assert torch.equal(x, sc.solve(problem, sc.TemperedSMC(128), seed=0).sample(200, seed=1))
    solution.save(tmp_path / "run")
    loaded = sc.load(tmp_path / "run", problem)
    assert torch.equal(x, loaded.sample(200, seed=1)) and loaded.method == "tempered-smc"


def test_densities_that_vanish_or_fail():
    """-inf is where the density vanishes; nan and +inf are errors with their rows; -inf everywhere says what to
    give."""

    def box(x):
        return torch.where((x.abs() < 1).all(1), 0.0, -math.inf)

    target = StateTarget(box, torch.zeros(2, dtype=F64), torch.full((2,), 2.0, dtype=F64), smooth=False)
    ladder, _ = adapt(target, 512, 0)
    found = run_tempered(target, ladder, 32, 512, 1)
    close(mean_estimate((found.log_z - math.log(4)).exp()), 1.0, 0.05)
    assert bool((target.states(found.z).abs() < 1).all())
    for bad, what in ((math.nan, "nan"), (math.inf, r"\+inf")):
        wrong = StateTarget(lambda x, bad=bad: torch.where(x[:, 0] > 0, bad, 0.0), target.centre, target.scale, False)
        with pytest.raises(sc.NonFiniteError, match=f"{what} .*rows"):
            adapt(wrong, 64, 0)
    nowhere = StateTarget(lambda x: torch.full_like(x[:, 0], -math.inf), target.centre, target.scale, False)
    with pytest.raises(sc.NonFiniteError, match="-inf at all"):
        adapt(nowhere, 64, 0)


def test_bad_input():
    with pytest.raises(ValueError, match="num_particles must be an int >= 16"):
        sc.TemperedSMC(4)
    with pytest.raises(ValueError, match="space"):
        sc.TemperedSMC(space="state")
    problem = random_lq(2, seed=1)
    with pytest.raises(ValueError, match="needs a gibbs_problem"):
        sc.solve(problem, sc.TemperedSMC(space="states"))
    with pytest.raises(ValueError, match="trains nothing"):
        sc.solve(problem, sc.TemperedSMC(), iterations=3)
    conditional = sc.ControlProblem(
        sc.BrownianMotion(1), sc.Dirac(torch.zeros(1)), lambda x, y: -((x - y) ** 2).sum(1), condition=torch.randn(5, 1)
    )
    with pytest.raises(ValueError, match="condition"):
        sc.solve(conditional, sc.TemperedSMC())


def test_the_target_of_noises_is_the_log_weight_of_their_paths():
    """phi against ``log_weights`` of the same paths, start, learned start, cost and control included."""
    problem = random_lq(2, 3, seed=1, start="controlled")
    control = lambda x, t: 0.3 - 0.2 * t[:, None] * torch.cat((x, x[:, :1]), 1)  # noqa: E731
    chain = problem.chain(6)
    control = sc.solve(problem, sc.RewardBackprop(), time_steps=6, iterations=3, seed=0).control
    target = NoiseTarget(problem, chain, control)
    z, origin = randn(50, target.dim, seed=3), target.draw_origin(50, 0)
    noise = z.reshape(50, chain.steps, 3).transpose(0, 1)
    with torch.no_grad():
        paths = sc.simulate(problem, 50, control=control, time_steps=6, noise=noise)
        phi = target.log_ratio(z, origin)
    assert torch.allclose(phi, log_weights(problem, paths), atol=1e-12)


# ---------------------------------------------------------------- particles that begin with a law


def wrong_law(kind):
    """Covers the two wells, with the wrong shares, places and widths; of the state over the scale 2."""
    means = torch.tensor([[-0.9, 0.3], [0.5, -0.2], [1.4, 1.0]], dtype=F64)
    if kind == "product":
        return ProductMixture(
            torch.ones(2, 2, dtype=F64),
            torch.tensor([[-0.9, 0.7], [-0.3, 0.5]], dtype=F64),
            torch.full((2, 2), 0.2, dtype=F64),
        )
    return GaussianMixture(
        torch.tensor([0.7, 0.1, 0.2], dtype=F64), means, torch.stack([0.2 * spd(2, i) for i in range(3)])
    )


def wells_from(law, smooth=True):
    return StateTarget(two_wells, torch.zeros(2, dtype=F64), torch.full((2,), 2.0, dtype=F64), smooth, law)


@pytest.mark.parametrize(
    ("kind", "smooth"),
    slow_but(list(itertools.product(("product", "joint"), (True, False))), ("product", False), ("joint", True)),
)
def test_z_is_unbiased_from_a_wrong_law(kind, smooth):
    """As from the Gaussian, with levels between the law and the target, draws from the law among the moves, and
    exactly as many evaluations as are told."""
    calls = [0]

    def counted(x):
        calls[0] += len(x)
        return two_wells(x)

    target = wells_from(wrong_law(kind), smooth)
    target.log_density = counted
    ladder, first = adapt(target, 256, 0, fraction=0.85)
    assert len(ladder) > 1 and calls[0] == first.evaluations
    calls[0] = 0
    found = run_tempered(target, ladder, 2500, 16, 1)
    assert calls[0] == found.evaluations
    relative = (found.log_z - math.log(3)).exp()
    close(mean_estimate(relative), 1.0, 0.02)
    assert float(relative.std()) > 0.1
    means = relative.unsqueeze(1) * (found.log_weights.exp().unsqueeze(2) * target.states(found.z)).sum(1)
    for mean, truth in zip(means.T, (0.5, 1 / 3)):
        close(mean_estimate(mean), truth, 0.04)


def test_from_the_targets_own_law_nothing_is_left_to_do():
    """phi is log Z everywhere: one level, equal weights, every draw accepted."""
    cov = torch.tensor([[0.3, 0.2], [0.2, 0.4]], dtype=F64)
    means = torch.tensor([[-1.5, 0.0], [1.5, 0.5]], dtype=F64)
    law = GaussianMixture(
        torch.tensor([1.0, 2.0], dtype=F64), means / 2, torch.stack((0.2 * torch.eye(2, dtype=F64), cov)) / 4
    )
    target = wells_from(law)
    ladder, found = adapt(target, 128, 0)
    assert len(ladder) == 1 and float(ladder.betas[0]) == 1.0
    assert torch.allclose(found.phi, torch.full_like(found.phi, math.log(3)), atol=1e-9)
    assert abs(float(found.log_z) - math.log(3)) < 1e-9
    p = start_points(target, 500, 1)
    q = Kernel(1.0, *fit_gaussian(p.z, torch.full((500,), 0.002)), 1).independence_move(
        target, p, torch.Generator().manual_seed(0)
    )
    assert bool((q.z != p.z).any(1).all())
    assert torch.allclose(p.slope, torch.zeros_like(p.slope), atol=1e-9)


@pytest.mark.parametrize("move", ["move", "independence_move"])
@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize(
    ("beta", "kind"), [(0.3, "one"), (1.0, "one"), (1.0, "joint"), (1.0, "diagonal"), (1.0, "product")]
)
def test_moves_from_a_law_keep_theirs(smooth, beta, kind, move):
    """Exact draws of ``law^(1-beta) target^beta``, Gaussians all, have its moments after moves in the components'
    coordinates and after draws from the law; at the target itself from mixtures, too, that are nothing like it."""
    cov, mean, start, where = spd(2, 3), 0.7 * randn(2, seed=4), 1.5 * spd(2, 5), 0.5 * randn(2, seed=6)
    aim = torch.distributions.MultivariateNormal(mean, cov)
    law = GaussianMixture(torch.ones(1, dtype=F64), where.unsqueeze(0), start.unsqueeze(0))
    if kind != "one":
        weights, means = torch.tensor([0.3, 0.7], dtype=F64), torch.stack((where - 1, where + 0.5))
        wide = torch.stack((start, 0.5 * cov + torch.eye(2, dtype=F64)))
        law = GaussianMixture(weights, means, wide if kind == "joint" else wide.diagonal(dim1=1, dim2=2).contiguous())
        if kind == "product":
            law = ProductMixture(
                weights.expand(2, 2).contiguous(), means.T.contiguous(), torch.full((2, 2), 1.3, dtype=F64)
            )
    target = StateTarget(aim.log_prob, torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64), smooth, law)
    first, last = torch.linalg.inv(start), torch.linalg.inv(cov)
    mixed = torch.linalg.inv((1 - beta) * first + beta * last)
    centre = mixed @ ((1 - beta) * first @ where + beta * last @ mean)
    root, n = torch.linalg.cholesky(mixed), 40_000
    p = points_at(target, centre + randn(n, 2, seed=5) @ root.T, torch.zeros(n, 0, dtype=F64))
    began = p.z
    kernel = Kernel(beta, 0.4 * randn(2, seed=6), 1.2 * torch.linalg.cholesky(spd(2, 7)), 3 if smooth else 1)
    generator = torch.Generator().manual_seed(8)
    for _ in range(6):
        p = (
            kernel.move(target, p, 0.9, generator)[0]
            if move == "move"
            else kernel.independence_move(target, p, generator)
        )
    again = points_at(target, p.z, p.origin)  # what is kept of a particle is what belongs to it
    for name in ("phi", "slope"):
        assert torch.allclose(getattr(p, name), getattr(again, name), atol=1e-12), name
    assert float((began - p.z).abs().mean()) > 0.1
    standard = torch.linalg.solve_triangular(root, (p.z - centre).T, upper=False).T
    for i in range(2):
        close(mean_estimate(standard[:, i]), 0.0, 0.02)
        for j in range(i + 1):
            close(mean_estimate(standard[:, i] * standard[:, j]), float(i == j), 0.02)


@pytest.mark.parametrize("frame", ["full", "diagonal", "component", "coordinates"])
def test_kicks_are_the_gradient_of_the_energy(frame):
    """In the coordinates w of a fitted Gaussian, or of each particle's own component: ``residual_gradient`` is
    autograd's gradient of the energy beyond ``|w|^2/2``. A kick of another size would still leave the law invariant,
    and only be rejected more."""
    beta, x = 0.3, 1.5 * randn(40, 2, seed=1)
    law = {"component": wrong_law("joint"), "coordinates": wrong_law("product")}.get(frame)
    target = StateTarget(two_wells, randn(2, seed=2), torch.tensor([0.8, 1.7], dtype=F64), law=law)
    if law is None:
        factor = torch.linalg.cholesky(spd(2, 3)) if frame == "full" else torch.tensor([0.6, 1.4], dtype=F64)
        coordinates = Fitted(randn(2, seed=4), factor)
    else:
        coordinates = Component(*law.component(x, torch.Generator().manual_seed(0)))
    w, v, origin = coordinates.standardise(x).requires_grad_(True), randn(40, 2, seed=5), x.new_zeros(40, 0)
    z = coordinates.unstandardise(w)
    assert torch.allclose(z, x, atol=1e-12)
    phi = target.log_ratio(z, origin)
    if law is not None:
        phi = phi - law.log_prob(z) - 0.5 * z.square().sum(1) - math.log(2 * math.pi)
    points = points_at(target, x, origin)
    assert torch.allclose(points.phi, phi.detach(), atol=1e-10)
    beyond = coordinates.energy(Points(z, phi, points.slope, origin), w, v, beta) - 0.5 * w.square().sum(1)
    slope = torch.autograd.grad(beyond.sum(), w)[0]
    assert torch.allclose(coordinates.residual_gradient(points, w.detach(), beta), slope, atol=1e-9)


@pytest.mark.parametrize("kind", ["joint", "product"])
def test_moves_from_the_targets_own_law_are_never_rejected(kind):
    """Within a component the flow is an exact rotation, and phi is constant: nothing is left that kicks, however far
    one turns."""
    law = wrong_law(kind)
    target = StateTarget(law.log_prob, torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64), True, law)
    p = start_points(target, 200, 0)
    kernel = Kernel(1.0, randn(2, seed=1), torch.eye(2, dtype=F64), 5, jitter=0.0)
    q, accept = kernel.move(target, p, 1.4, torch.Generator().manual_seed(0))
    assert bool(accept.all()) and float((q.z - p.z).abs().mean()) > 0.1


def test_a_law_on_a_hard_constraint():
    """Where the density vanishes particles never go, though the law does; a box of area 4 from a Gaussian that leaves
    half of its draws outside."""

    def box(x):
        return torch.where((x.abs() < 1).all(1), 0.0, -math.inf)

    law = GaussianMixture(torch.ones(1, dtype=F64), torch.zeros(1, 2, dtype=F64), 0.3)
    target = StateTarget(box, torch.zeros(2, dtype=F64), torch.full((2,), 2.0, dtype=F64), False, law)
    ladder, _ = adapt(target, 512, 0)
    found = run_tempered(target, ladder, 32, 512, 1)
    close(mean_estimate((found.log_z - math.log(4)).exp()), 1.0, 0.05)
    x = target.states(found.z)
    weights = found.log_weights.exp().unsqueeze(2)
    assert bool(((x.abs() < 1) | (weights == 0)).all())
    close(mean_estimate((weights * x.square()).sum(1)[:, 0]), 1 / 3, 0.02)


@pytest.mark.parametrize("law", [None, "joint"])
def test_trajectories_that_diverge_are_rejected_and_never_seen_by_the_density(law):
    """A density so steep that one kick throws particles a million standard deviations away: they stay, no move counts
    as accepted, and no call is beyond."""
    furthest = [0.0]

    def steep(x):
        furthest[0] = max(furthest[0], float(x.detach().abs().max()))
        return -1e9 * x.pow(4).sum(1)

    target = StateTarget(steep, torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64), law=law and wrong_law(law))
    p = points_at(target, 1 + randn(50, 2, seed=1).abs(), torch.zeros(50, 0, dtype=F64))
    kernel = Kernel(1.0, torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64), 4, jitter=0.0)
    moved, accept = kernel.move(target, p, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(moved.z, p.z) and not bool(accept.any()) and furthest[0] < 2e6


def test_the_error_of_one_system_is_that_of_its_families():
    """Without resampling that of the weights; one family alone says nothing; and over repetitions with few moves,
    which forget little, the spread of log Z^ is what is stated (by a factor of 1.5; the weights alone state half)."""
    w = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=F64)
    assert ancestral_variance(torch.arange(4), w) == pytest.approx(float(w.square().sum()) - 0.25)
    assert ancestral_variance(torch.zeros(4, dtype=torch.long), w) == pytest.approx(0.75)
    assert ancestral_variance(torch.arange(4), torch.full((4,), 0.25, dtype=F64)) == pytest.approx(0.0, abs=1e-15)
    target = StateTarget(lambda x: -0.5 * ((x - 1) / 0.3).square().sum(1), torch.zeros(4), torch.ones(4), smooth=False)
    found = [adapt(target, 256, seed, fraction=0.5, most_moves=1)[1] for seed in range(60)]
    spread = float(torch.stack([p.log_z[0] for p in found]).std())
    stated = math.sqrt(sum(p.variance for p in found) / len(found))
    assert spread / 1.5 < stated < spread * 1.5
    ladder_alone = [math.sqrt(float(((1 / p.ess - 1) * p.resampled).sum()) / 256) for p in found]
    assert sum(ladder_alone) / len(found) < 0.7 * spread


class Flat:
    """Nothing but noises of three tokens, of two, two and three numbers: every move is accepted."""

    dim, smooth, dtype, device, law, batch_size = 7, False, F64, torch.device("cpu"), None, None
    parts = torch.tensor([0, 1, 0, 2, 1, 2, 2])

    def log_ratio(self, z, origin):
        return torch.zeros(len(z), dtype=F64)


@pytest.mark.parametrize("angle", [1e-3, 0.5])
def test_a_move_of_tokens_draws_whole_positions_anew_and_keeps_the_others(angle):
    """One at least; each other one with a probability of the mean angle over a quarter turn."""
    n = 1 << 14
    z = torch.randn(n, 7, generator=torch.Generator().manual_seed(0), dtype=F64)
    p = Points(z, torch.zeros(n, dtype=F64), torch.zeros_like(z), torch.zeros(n, 0))
    kernel = Kernel(1.0, torch.zeros(7, dtype=F64), torch.ones(7, dtype=F64), 1)
    new, accepted = kernel.move(Flat(), p, angle, torch.Generator().manual_seed(1))
    assert bool(accepted.all())
    moved = (new.z - z).abs() > 1e-9
    by_part = torch.stack([moved[:, Flat.parts == j] for j in (0, 1)])
    assert bool((by_part.all(2) == by_part.any(2)).all())
    whole = torch.stack([moved[:, Flat.parts == j].all(1) for j in range(3)], 1)
    assert bool((whole.any(1) & (moved.sum(1) == whole.double() @ torch.tensor([2.0, 2.0, 3.0], dtype=F64))).all())
    share = angle * (1 - math.exp(-3.0)) / 3.0 / (0.5 * math.pi)
    assert float(whole.double().mean()) == pytest.approx((1 + 2 * share) / 3, abs=0.01)
    drawn, old = new.z[moved], z[moved]
    assert abs(float((drawn * old).mean())) < 0.03 and float(drawn.var()) == pytest.approx(1.0, abs=0.04)
