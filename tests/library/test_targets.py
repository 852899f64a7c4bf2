"""The named targets: constants by quadrature, exact samples, gradients, precision, and the symmetries of particle
systems."""

from __future__ import annotations

import math
import sys
from itertools import permutations

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

import sdecontrol as sc
from sdecontrol.evaluation.evaluate import log_weights
from sdecontrol.library.particle_systems import DoubleWellSystem, LennardJones, ParticleSystem
from sdecontrol.library.targets import Funnel, LogisticRegression, ManyWell, Mixture, PhiFour

DOUBLE = torch.float64
NAMES = [
    "dw-4",
    "funnel",
    "gmm40-2d",
    "gmm40-50d",
    "gmm9",
    "lj-13",
    "logistic-regression",
    "many-well-32",
    "many-well-5",
    "many-well-50",
    "phi4-8",
]
DIMENSIONS = dict(zip(NAMES, (6, 10, 2, 50, 2, 36, 31, 32, 5, 50, 64)))
SAMPLED = [n for n in NAMES if n not in ("dw-4", "lj-13", "logistic-regression", "phi4-8")]
PARTICLES = ["dw-4", "lj-13"]
N = 40_000


def states(name: str, n: int = 20, seed: int = 0) -> Tensor:
    """States of all kinds in float64: near the bulk of every target and around it."""
    target, generator = sc.library.named_target(name), torch.Generator().manual_seed(seed)
    x = torch.randn(n, target.dim, generator=generator, dtype=DOUBLE)
    return x * torch.linspace(0.3, 2.0, n, dtype=DOUBLE).unsqueeze(1)


# ------------------------------------------------------------------ names


def test_names() -> None:
    assert sc.library.target_names() == NAMES
    with pytest.raises(ValueError, match="unknown target 'many-well-31'; did you mean 'many-well-32'"):
        sc.library.named_target("many-well-31")
    assert sc.library.named_target("gmm40").name == "gmm40-2d"


@pytest.mark.parametrize("name", NAMES)
def test_global_generator_untouched_and_same_every_time(name: str) -> None:
    state = torch.get_rng_state()
    one, again = sc.library.named_target(name), sc.library.named_target(name)
    x = states(name)
    assert torch.equal(one(x), again(x))
    if one.has_samples:
        assert torch.equal(one.sample(5, seed=3), again.sample(5, seed=3))
        assert not torch.equal(one.sample(5, seed=3), one.sample(5, seed=4))
    assert torch.equal(state, torch.get_rng_state())
    card = sc.library.target_card(name)
    assert (one.name, one.version, one.definition) == (name, 1, card.definition) and card.definition
    assert one.dim == DIMENSIONS[name]


def test_forty_means_are_those_of_the_published_seed() -> None:
    for name, dim in (("gmm40-2d", 2), ("gmm40-50d", 50)):
        torch.manual_seed(0)
        means = (torch.rand(40, dim) - 0.5) * 80
        modes = sc.library.named_target(name).modes
        assert modes is not None and torch.equal(modes.float(), means)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"'logistic-regression' needs scikit-learn: pip install .*examples"):
        sc.library.named_target("logistic-regression")


def test_wrong_shapes_and_missing_samples_are_named() -> None:
    target = sc.library.named_target("gmm9")
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 2\)"):
        target(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="n must be an int >= 1"):
        target.sample(0, seed=0)
    with pytest.raises(sc.NoExactSolution, match="dw-4 has no exact sampler"):
        sc.library.named_target("dw-4").sample(3, seed=0)


# ------------------------------------------------------------------ definitions by hand


def test_definitions_at_states_computed_by_hand() -> None:
    """Each log density against its definition written out for one state, in plain Python."""
    log_2pi = math.log(2 * math.pi)
    gmm9 = sc.library.named_target("gmm9")(torch.tensor([[1.0, -4.0]], dtype=DOUBLE))
    total = sum(math.exp(-((1 - a) ** 2 + (-4 - b) ** 2) / 0.6) for a in (-5, 0, 5) for b in (-5, 0, 5))
    assert float(gmm9) == pytest.approx(math.log(total / 9 / (2 * math.pi * 0.3)))
    for name, sd in (("gmm40-2d", 1.3132617), ("gmm40-50d", 1.0)):  # at a mode that is 15 deviations from all others
        target = sc.library.named_target(name)
        assert target.modes is not None
        alone = torch.cdist(target.modes, target.modes).fill_diagonal_(math.inf).amin(1).argmax()
        want = -math.log(40) - target.dim * (0.5 * log_2pi + math.log(sd))
        assert float(target(target.modes[alone][None])) == pytest.approx(want, abs=1e-4)
    x = [0.7 - 0.1 * i for i in range(10)]
    funnel = -(x[0] ** 2) / 18 - 0.5 * math.log(9) - 0.5 * log_2pi
    funnel += sum(-0.5 * v**2 * math.exp(-x[0]) - 0.5 * x[0] - 0.5 * log_2pi for v in x[1:])
    assert float(sc.library.named_target("funnel")(torch.tensor([x], dtype=DOUBLE))) == pytest.approx(funnel)
    x = [1.5 * math.sin(3 * i + 1) for i in range(32)]
    wells = sum(-(a**4) + 6 * a**2 + a / 2 - b**2 / 2 for a, b in zip(x[::2], x[1::2]))
    assert float(sc.library.named_target("many-well-32")(torch.tensor([x], dtype=DOUBLE))) == pytest.approx(wells)
    x = [1.5 * math.sin(3 * i + 1) for i in range(50)]
    five = -sum((v**2 - 4) ** 2 for v in x[:5])
    assert float(sc.library.named_target("many-well-5")(torch.tensor([x[:5]], dtype=DOUBLE))) == pytest.approx(five)
    fifty = -sum((v**2 - 2) ** 2 for v in x[:5]) - sum(v**2 / 2 for v in x[5:])
    assert float(sc.library.named_target("many-well-50")(torch.tensor([x], dtype=DOUBLE))) == pytest.approx(fifty)
    phi = [[math.sin(3 * i + j) for j in range(8)] for i in range(8)]
    action = sum(
        (phi[(i + 1) % 8][j] - phi[i][j]) ** 2
        + (phi[i][(j + 1) % 8] - phi[i][j]) ** 2
        - 4 * phi[i][j] ** 2
        + 6.008 * phi[i][j] ** 4
        for i in range(8)
        for j in range(8)
    )
    flat = torch.tensor(phi, dtype=DOUBLE).reshape(1, 64)
    assert float(sc.library.named_target("phi4-8")(flat)) == pytest.approx(-action)


@pytest.mark.parametrize("name", PARTICLES)
def test_particle_energies_by_hand(name: str) -> None:
    target = sc.library.named_target(name)
    assert isinstance(target, ParticleSystem)
    generator = torch.Generator().manual_seed(1)
    p = 4.0 * torch.randn(target.particles, target.space, generator=generator, dtype=DOUBLE)
    points, energy = p.tolist(), 0.0
    for i, a in enumerate(points):
        for b in points[:i]:
            r = math.dist(a, b)
            assert r > 0.6
            energy += 0.9 * (r - 4) ** 4 - 4 * (r - 4) ** 2 if name == "dw-4" else r**-12 - 2 * r**-6
    if name == "lj-13":
        energy += 0.5 * float((p - p.mean(0)).square().sum())
    assert -float(target(target.coordinates(p.unsqueeze(0)))) == pytest.approx(energy, rel=1e-12)


def test_logistic_regression_by_hand() -> None:
    """Log likelihood by torch's cross entropy and the prior by its normal law; the features have mean 0 and variance
    1."""
    target = sc.library.named_target("logistic-regression")
    assert isinstance(target, LogisticRegression)
    features, labels = target.features, target.labels
    assert features.shape == (569, 31) and int(labels.sum()) == 357  # benign
    assert (features[:, 0] == 1).all()
    torch.testing.assert_close(features[:, 1:].mean(0), torch.zeros(30, dtype=DOUBLE), rtol=0, atol=1e-10)
    torch.testing.assert_close(features[:, 1:].square().mean(0), torch.ones(30, dtype=DOUBLE))
    x = states("logistic-regression", 4)
    want = [
        -torch.nn.functional.binary_cross_entropy_with_logits(features @ b, labels, reduction="sum")
        + torch.distributions.Normal(0.0, 1.0).log_prob(b).sum()
        for b in x
    ]
    torch.testing.assert_close(target(x), torch.stack(want))


# ------------------------------------------------------------------ log Z


def one_well(name: str) -> tuple[float, float]:
    """Integral and left share of one double well, by adaptive quadrature."""
    factor = {
        "many-well-32": lambda x: math.exp(-(x**4) + 6 * x**2 + x / 2),
        "many-well-5": lambda x: math.exp(-((x**2 - 4) ** 2)),
        "many-well-50": lambda x: math.exp(-((x**2 - 2) ** 2)),
    }[name]
    left, right = (quad(factor, *ends, epsabs=1e-13, epsrel=1e-13, limit=200)[0] for ends in ((-7, 0), (0, 7)))
    return left + right, left / (left + right)


@pytest.mark.parametrize(
    "name, wells, normals, value",
    [("many-well-32", 16, 16, 164.695675), ("many-well-5", 5, 0, -0.541056), ("many-well-50", 5, 45, 42.817243)],
)
def test_log_z_of_the_wells(name: str, wells: int, normals: int, value: float) -> None:
    target = sc.library.named_target(name)
    assert isinstance(target, ManyWell) and target.log_z is not None
    integral, left = one_well(name)
    want = wells * math.log(integral) + 0.5 * normals * math.log(2 * math.pi)
    assert target.log_z == pytest.approx(want, abs=1e-9)
    assert target.log_z == pytest.approx(value, abs=1e-6)
    assert target.left_share == pytest.approx(left, abs=1e-9)
    if name == "many-well-32":
        assert target.left_share == pytest.approx(0.1557, abs=5e-5)


@pytest.mark.parametrize("name", ["gmm9", "gmm40-2d"])
def test_log_z_of_the_mixtures_by_quadrature(name: str) -> None:
    target = sc.library.named_target(name)
    reach, step = (
        (10, 0.05) if name == "gmm9" else (50, 0.25)
    )  # the trapezoidal rule is exact to rounding for wider Gaussians
    axis = torch.arange(-reach, reach, step, dtype=DOUBLE)
    integral = target(torch.cartesian_prod(axis, axis)).exp().sum() * step**2
    assert math.log(float(integral)) == pytest.approx(target.log_z, abs=1e-9)


def test_log_z_of_the_normalised_targets_in_many_dimensions() -> None:
    """log p is that of the laws it is made of."""
    x = states("funnel")
    given = torch.distributions.Normal(torch.zeros(20, 9, dtype=DOUBLE), (0.5 * x[:, :1]).exp())
    first = torch.distributions.Normal(0.0, 3.0).log_prob(x[:, 0])
    torch.testing.assert_close(sc.library.named_target("funnel")(x), first + given.log_prob(x[:, 1:]).sum(1))
    target = sc.library.named_target("gmm40-50d")
    assert target.modes is not None
    law = sc.GaussianMixture(torch.ones(40, dtype=DOUBLE), target.modes, 1.0)
    x = states("gmm40-50d") + target.modes[:20]
    torch.testing.assert_close(target(x), law.log_prob(x))
    assert target.log_z == 0 and sc.library.named_target("funnel").log_z == 0


# ------------------------------------------------------------------ exact samples


@pytest.mark.parametrize("name", SAMPLED)
def test_mean_score_of_exact_samples_is_zero(name: str) -> None:
    """``E score = 0`` and ``E x_i score_i = -1`` at the target, all coordinates; 4 standard errors (false alarm below
    100 x 6e-5, seed fixed)."""
    torch.set_default_dtype(DOUBLE)
    target = sc.library.named_target(name)
    n = N if target.dim < 50 else 4000
    x = target.sample(n, seed=0).requires_grad_()
    score = torch.autograd.grad(target(x).sum(), x)[0]
    x = x.detach()
    for values, truth in ((score, 0.0), (x * score, -1.0)):
        error = values.std(0) / math.sqrt(n)
        assert float(((values.mean(0) - truth).abs() / error).max()) < 4.5


@pytest.mark.parametrize("name", ["gmm9", "gmm40-2d", "gmm40-50d", "many-well-5", "many-well-50"])
def test_modes_have_equal_shares_of_exact_samples(name: str) -> None:
    target = sc.library.named_target(name)
    assert target.modes is not None
    x = target.sample(N, seed=1)
    deep = target.modes[:, :5] if isinstance(target, ManyWell) else target.modes
    near = x[:, :5] if isinstance(target, ManyWell) else x
    found = sc.metrics.mode_coverage(near, deep)
    k = len(target.modes)
    assert found.hit == k == len(found.shares)
    if name != "gmm40-2d":  # whose modes overlap
        error = math.sqrt((1 - 1 / k) / k / N)
        assert float((found.shares - 1 / k).abs().max()) < 4.5 * error


def test_modes_are_maxima() -> None:
    for name in ("gmm9", "gmm40-50d", "many-well-5", "many-well-50"):
        target = sc.library.named_target(name)
        assert target.modes is not None
        x = target.modes.clone().requires_grad_()
        score = torch.autograd.grad(target(x).sum(), x)[0]
        assert float(score.abs().max()) < 1e-10
        nudge = 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
        assert (target(x + nudge) < target(x)).all()


def test_wells_of_exact_samples() -> None:
    """Left shares within 4 standard errors, all 16 wells; moments of one well against quadrature."""
    target = sc.library.named_target("many-well-32")
    assert isinstance(target, ManyWell)
    x = target.sample(N, seed=2)
    error = math.sqrt(0.1557 * 0.8443 / N)
    shares = target.left_shares(x)
    assert shares.shape == (16,) and float((shares - 0.15569).abs().max()) < 4 * error
    integral, _ = one_well("many-well-32")
    for power in (1, 2, 4):
        moment = quad(lambda v: v**power * math.exp(-(v**4) + 6 * v**2 + v / 2), -7, 7)[0] / integral  # noqa: B023
        values = x[:, ::2].double().pow(power)
        assert abs(float(values.mean()) - moment) < 4 * float(values.std()) / math.sqrt(values.numel())
    assert abs(float(x[:, 1::2].double().var()) - 1) < 4 * math.sqrt(2 / (16 * N))


def test_funnel_samples() -> None:
    x = sc.library.named_target("funnel").sample(N, seed=3).double()
    assert abs(float(x[:, 0].std()) - 3) < 4 * 3 / math.sqrt(2 * N)
    standard = x[:, 1:] * (-0.5 * x[:, :1]).exp()
    assert abs(float(standard.var()) - 1) < 4 * math.sqrt(2 / (9 * N))
    assert x.dtype == DOUBLE and sc.library.named_target("funnel").sample(2, seed=0).dtype == torch.float32


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_that_of_finite_differences(name: str) -> None:
    target = sc.library.named_target(name)
    x = states(name, 4)
    assert torch.autograd.gradcheck(lambda v: target(v), x.requires_grad_(), eps=1e-6, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_single_precision_is_that_of_double_precision(name: str) -> None:
    """Values and scores, relative to the largest, where double precision has the same input."""
    target = sc.library.named_target(name)
    x = (target.sample(200, seed=0) if target.has_samples else states(name, 200)).float()
    results = []
    for leaf in (x.clone().requires_grad_(), x.double().requires_grad_()):
        value = target(leaf)
        assert value.dtype == leaf.dtype
        results.append((value.detach().double(), torch.autograd.grad(value.sum(), leaf)[0].double()))
    for single, double in zip(*results):
        scale = double.flatten(1).abs().amax(1) if double.ndim > 1 else double.abs()
        error = (single - double).abs()
        error = error.flatten(1).amax(1) if error.ndim > 1 else error
        assert float((error / (1 + scale)).max()) < 3e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_finite_far_out(name: str, dtype: torch.dtype) -> None:
    """At +-1e3 in all coordinates and in one, at 0, and where all particles sit on one spot."""
    target = sc.library.named_target(name)
    rows = [torch.full((target.dim,), v, dtype=dtype) for v in (0.0, 1e3, -1e3, 1e-4)]
    for j in (0, target.dim - 1):
        for v in (-1e3, 1e3):
            rows.append(torch.zeros(target.dim, dtype=dtype).index_fill(0, torch.tensor(j), v))
    x = torch.stack(rows).requires_grad_()
    value = target(x)
    assert torch.isfinite(value).all()
    assert torch.isfinite(torch.autograd.grad(value.sum(), x)[0]).all()


# ------------------------------------------------------------------ particle systems


def rotation(space: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix."""
    return torch.linalg.qr(torch.randn(space, space, generator=generator, dtype=DOUBLE))[0]


@pytest.mark.parametrize("name", PARTICLES)
def test_coordinates_are_an_isometry_onto_mean_zero(name: str) -> None:
    target = sc.library.named_target(name)
    assert isinstance(target, ParticleSystem)
    x = states(name)
    p = target.positions(x)
    assert p.shape == (20, target.particles, target.space)
    assert float(p.mean(1).abs().max()) < 1e-12
    torch.testing.assert_close(target.coordinates(p), x)
    torch.testing.assert_close(p.flatten(1).norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(target.coordinates(p + 5.0), x)


@pytest.mark.parametrize("name", PARTICLES)
def test_rotations_and_permutations_change_nothing(name: str) -> None:
    target, generator = sc.library.named_target(name), torch.Generator().manual_seed(4)
    assert isinstance(target, ParticleSystem)
    x = 1.5 * states(name)
    p, value, distances = target.positions(x), target(x), target.distances(x).sort(1).values
    orders = (
        list(permutations(range(4)))
        if name == "dw-4"
        else [torch.randperm(13, generator=generator).tolist() for _ in range(10)]
    )
    for order in orders:
        moved = target.coordinates(p[:, order] @ rotation(target.space, generator).mT)
        torch.testing.assert_close(target(moved), value, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(target.distances(moved).sort(1).values, distances)


@pytest.mark.parametrize("name", PARTICLES)
def test_distance_histogram(name: str) -> None:
    target = sc.library.named_target(name)
    assert isinstance(target, ParticleSystem)
    x = states(name, 50)
    density, edges = target.distance_histogram(x, 30)
    assert density.shape == (30,) and edges.shape == (31,)
    assert float(density.sum() * (edges[1] - edges[0])) == pytest.approx(1.0)
    middle = 0.5 * (edges[1:] + edges[:-1])
    mean = float((density * middle).sum() * (edges[1] - edges[0]))
    assert mean == pytest.approx(float(target.distances(x).mean()), rel=0.05)


def test_lennard_jones_goes_on_smoothly_below_its_core() -> None:
    """Value, slope and curvature are continuous at r = 0.6; above it the pair energy is exactly ``r^-12 - 2 r^-6``."""
    pair = LennardJones(2, 1)

    def energy(r: Tensor) -> Tensor:  # without the harmonic part
        x = pair.coordinates(torch.stack((torch.zeros_like(r), r), 1).unsqueeze(2))
        return -pair(x) - 0.5 * x.square().sum(1)

    r = torch.tensor([0.6 - 1e-7, 0.6 + 1e-7, 0.8, 1.0], dtype=DOUBLE, requires_grad=True)
    value = energy(r)
    slope = torch.autograd.grad(value.sum(), r, create_graph=True)[0]
    bend = torch.autograd.grad(slope.sum(), r)[0]
    torch.testing.assert_close(value[2:], r[2:] ** -12 - 2 * r[2:] ** -6)
    value, slope = value.detach(), slope.detach()
    for v, rtol in ((value, 1e-5), (slope, 1e-5), (bend, 1e-5)):
        torch.testing.assert_close(v[0], v[1], rtol=rtol, atol=0)
    assert float(value[3]) == pytest.approx(-1.0) and float(slope[3].abs()) < 1e-9
    inner = energy(torch.linspace(1e-3, 0.6, 50, dtype=DOUBLE))
    assert (inner[1:] < inner[:-1]).all() and float(inner[0]) > 3e4


def test_two_wells_of_a_pair_of_particles() -> None:
    """The pair energy of dw-4 is least at ``4 +- sqrt(2/0.9)``, -4.44 there."""
    pair = DoubleWellSystem(2, 2)
    r = torch.tensor([4 - math.sqrt(2 / 0.9), 4 + math.sqrt(2 / 0.9), 4.0], dtype=DOUBLE)
    p = torch.stack((torch.zeros(3, 2, dtype=DOUBLE), torch.stack((r, torch.zeros(3, dtype=DOUBLE)), 1)), 1)
    energy = -pair(pair.coordinates(p))
    torch.testing.assert_close(energy, torch.tensor([-4 / 0.9, -4 / 0.9, 0.0], dtype=DOUBLE))


def test_field_symmetries() -> None:
    target = sc.library.named_target("phi4-8")
    assert isinstance(target, PhiFour)
    x = states("phi4-8")
    phi = target.field(x)
    moved = -phi.roll((3, -2), (1, 2)).transpose(1, 2).flip(1)
    torch.testing.assert_close(target(moved.flatten(1)), target(x))
    torch.testing.assert_close(target.magnetisation(moved.flatten(1)), -target.magnetisation(x))
    assert float(target(torch.full((1, 64), 0.5, dtype=DOUBLE))) == pytest.approx(64 * (4 * 0.25 - 6.008 * 0.0625))


# ------------------------------------------------------------------ as problems


@pytest.mark.parametrize("name", NAMES)
def test_every_target_makes_a_problem_with_its_own_pilot(name: str) -> None:
    target = sc.library.named_target(name)
    problem = sc.gibbs_problem(target, target.dim)
    paths = sc.simulate(problem, 64, time_steps=10, seed=0)
    assert torch.isfinite(log_weights(problem, paths)).all()
    if target.has_samples:  # all of them within the reference's reach
        x = target.sample(2000, seed=0)
        z = (x - problem.centre) / problem.scale
        assert float(z.square().mean()) < 3.0


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("name", PARTICLES)
def test_scale_of_the_particle_clusters_is_the_same_in_all_directions(name: str, seed: int) -> None:
    """A cluster from which an atom has gone in one chain of the pilot is no direction."""
    target = sc.library.named_target(name)
    problem = sc.gibbs_problem(target, target.dim, seed=seed)
    assert torch.equal(problem.centre, torch.zeros(target.dim)) and problem.scale.ndim == 0


def test_mixture_and_funnel_of_other_sizes() -> None:
    one = Mixture(torch.zeros(1, 3, dtype=DOUBLE), 2.0)
    assert float(one(torch.zeros(1, 3))) == pytest.approx(-1.5 * math.log(4 * math.pi))
    assert Funnel(3, 1.0).sample(4, seed=0).shape == (4, 3)
