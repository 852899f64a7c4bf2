"""Manifolds: their geometry against what it is, their laws, and processes on them that are none."""

import math

import numpy as np
import pytest
import torch
from cases import F64, randn

import sdecontrol as sc
from sdecontrol.methods.base import find_method, method_names
from sdecontrol.problems.differentiability import missing_gradients
from sdecontrol.processes.manifolds import cos_and_sinc

SPHERES = [sc.Sphere(1), sc.Sphere(2), sc.Sphere(5)]
NORTH = sc.Dirac(torch.tensor([0.0, 0.0, 1.0]))


def height(x):
    return x[:, -1]


@pytest.mark.parametrize("r", [0.0, 1e-9, 1e-3, 0.1, 0.17320508, 0.17320509, 1.0, 3.0, 7.0, 40.0])
def test_cos_and_sinc_are_so_on_both_sides_of_their_seam(r):
    cos, sinc = cos_and_sinc(torch.tensor(r, dtype=F64).square())
    assert abs(float(cos) - math.cos(r)) < 4e-16 * max(1, r) and abs(float(sinc) - np.sinc(r / math.pi)) < 3e-16


@pytest.mark.parametrize("s", [0.0, 1e-12, 0.0299, 0.0301, 4.0])
def test_derivatives_of_cos_and_sinc_are_finite_and_right_to_second_order(s):
    """``cos'(s) = -sinc/2`` and ``sinc'(s) = (cos - sinc)/(2s)``, -1/6 at 0; the second ones by central differences."""
    x = torch.tensor(s, dtype=F64, requires_grad=True)
    cos, sinc = cos_and_sinc(x)
    first = [torch.autograd.grad(f, x, create_graph=True)[0] for f in (cos, sinc)]
    slope = (cos - sinc) / (2 * x) if s > 1e-3 else torch.tensor(-1 / 6 + s / 60, dtype=F64)
    assert torch.allclose(torch.stack(first), torch.stack((-sinc / 2, slope)).detach(), atol=1e-13)
    second = [float(torch.autograd.grad(f, x, retain_graph=True)[0]) for f in first]
    if s == 0:
        assert np.allclose(second, [1 / 12, 1 / 60], atol=1e-15)
    else:
        assert np.isfinite(second).all() and torch.autograd.gradgradcheck(cos_and_sinc, [x])


@pytest.mark.parametrize("manifold", SPHERES)
def test_the_exponential_map_of_a_sphere_follows_great_circles(manifold):
    x = manifold.draw((50,), torch.Generator().manual_seed(0), dtype=F64)
    v = manifold.tangent(x, randn(50, manifold.dim + 1, seed=1))
    assert float((x * v).sum(1).abs().max()) < 1e-14 and torch.allclose(manifold.tangent(x, v), v, atol=1e-14)
    unit = v / v.norm(dim=1, keepdim=True)
    for length in (0.0, 1e-8, 0.3, math.pi, 4.0, 2 * math.pi, 20.0):
        want = math.cos(length) * x + math.sin(length) * unit
        assert torch.allclose(manifold.exp(x, length * unit), want, atol=1e-13)
    y = x.float()
    for k in range(2000):
        y = manifold.exp(y, manifold.tangent(y, 0.3 * randn(50, manifold.dim + 1, seed=k).float()))
    assert float((y.norm(dim=1) - 1).abs().max()) < 3e-7


@pytest.mark.parametrize("size", [0.0, 1e-3, 0.17, 3.0, 5.0])
def test_the_exponential_map_has_derivatives_of_second_order(size):
    """At no velocity, near the seam, and beyond the antipode, where it is smooth, too."""
    manifold = sc.Sphere(2)
    x, v = manifold.draw((2,), torch.Generator().manual_seed(2), dtype=F64), size * randn(2, 3, seed=3)
    leaves = [x.requires_grad_(True), v.requires_grad_(True)]
    step = lambda x, v: manifold.exp(x, manifold.tangent(x, v))  # noqa: E731
    assert torch.autograd.gradcheck(step, leaves) and torch.autograd.gradgradcheck(step, leaves, atol=1e-5)


def test_angles_are_wrapped_and_those_in_range_keep_every_bit():
    torus = sc.Torus(3)
    x = torus.draw((1000,), torch.Generator().manual_seed(0))
    assert torch.equal(torus.onto(x), x) and float(x.abs().max()) <= math.pi
    v = 30 * randn(1000, 3, seed=1)
    y = torus.exp(x.double(), v)
    assert float(y.abs().max()) <= math.pi
    assert torch.allclose((x.double() + v).cos(), y.cos(), atol=1e-12)
    assert torch.allclose((x.double() + v).sin(), y.sin(), atol=1e-12)


@pytest.mark.parametrize("manifold", [*SPHERES, sc.Torus(1), sc.Torus(3)])
def test_uniform_laws(manifold):
    """First and second moments of the embedding (5 standard errors), its volume, and where draws lie."""
    law = manifold.uniform(dtype=F64)
    n = 1 << 14
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = law.sample((n,))
    manifold.check("x", x)
    assert x.shape == (n, *manifold.event_shape) and x.dtype == F64
    z = torch.cat((x.cos(), x.sin()), 1) if manifold.angles else x
    each = 0.5 if manifold.angles else 1 / (manifold.dim + 1)
    second = z.mT @ z / n
    assert float(z.mean(0).abs().max()) < 5 * (each / n) ** 0.5
    assert float((second - each * torch.eye(len(second))).abs().max()) < 5 / n**0.5
    known = {"Sphere(dim=1)": 2 * math.pi, "Sphere(dim=2)": 4 * math.pi, "Sphere(dim=5)": math.pi**3}
    volume = known.get(str(manifold), (2 * math.pi) ** manifold.dim)
    assert torch.allclose(law.log_prob(x[:3]), torch.full((3,), -math.log(volume), dtype=F64))
    problem = sc.ControlProblem(sc.ManifoldSDE(manifold, initial=law), reward=height)
    assert problem.dtype == F64 and problem.random_start
    assert problem.reference.coordinate_spread == pytest.approx(each**0.5)  # by which networks scale what they see


BAD = {
    "manifold": (lambda: sc.ManifoldSDE(2), "manifold must be sc.Sphere"),
    "dim": (lambda: sc.Sphere(0), "dim must be an int >= 1"),
    "sigma": (lambda: sc.ManifoldSDE(sc.Sphere(2), sigma=0.0), "sigma must be > 0"),
    "sigma of no number": (lambda: sc.ManifoldSDE(sc.Sphere(2), sigma=torch.ones(3)), "sigma must be a number"),
    "sigma of time": (lambda: made(sigma=lambda t: 0.5 - t), "sigma.t = 0.5. must be > 0"),
    "drift": (lambda: sc.ManifoldSDE(sc.Sphere(2), drift=1.0), "drift must be callable"),
    "drift off the tangent space": (lambda: made(lambda x, t: torch.ones_like(x)), "drift leaves the tangent space"),
    "drift that leaves later": (lambda: made(lambda x, t: t * x), "drift leaves the tangent space"),
    "drift's shape": (lambda: made(lambda x, t: x[:, :2]), "drift must return shape"),
    "start": (lambda: made(initial=sc.Dirac(torch.tensor([0.0, 0.0, 1.1]))), "initial is off the sphere, by up to 0.1"),
    "start's law": (lambda: made(initial=sc.Gaussian(torch.zeros(3), 1.0)), "initial is off the sphere"),
    "angle": (
        lambda: sc.ControlProblem(sc.ManifoldSDE(sc.Torus(1)), sc.Dirac(torch.tensor([4.0])), height),
        r"initial is off the torus.*angles in \[-pi, pi\)",
    ),
    "state": (lambda: sc.simulate(made(), 2, state=2 * torch.eye(3)[:2], time_steps=3), "state is off the sphere"),
    "a linear scheme": (lambda: made().chain(4, "exact"), "has the scheme 'euler' alone"),
    "an exponential scheme": (lambda: made().chain(4, "exponential"), "has the scheme 'euler' alone"),
    "a solver": (lambda: sc.simulate(made(), 4, scheme="milstein"), "reference is a ManifoldSDE"),
    "a flow": (lambda: sc.simulate(made(), 4, scheme="probability-flow"), "needs a generative_sde"),
    "a likelihood": (lambda: sc.log_likelihood(made(), torch.eye(3)), "needs a generative_sde"),
    "a learned start": (lambda: made(initial=sc.Sphere(2).uniform(), start="controlled"), "needs a Gaussian"),
    "a fitted bridge": (
        lambda: sc.fit_bridge(torch.eye(3), sc.ManifoldSDE(sc.Sphere(2)), initial=NORTH, iterations=1),
        "ManifoldSDE",
    ),
    "a ratio": (lambda: sc.ValueGuidance("ratio").check(made()), "value='ratio' learns a density ratio on R"),
    "reciprocal": (lambda: sc.AdjointMatching(reciprocal=True).check(made()), "reciprocal=True draws bridges"),
}


def made(drift=None, sigma=1.0, initial=NORTH, **options):
    return sc.ControlProblem(sc.ManifoldSDE(sc.Sphere(2), drift, sigma), initial, height, **options)


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(name):
    call, message = BAD[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_a_control_is_called_on_the_manifold_and_answers_in_its_tangent_space():
    solution = sc.solve(made(), sc.LogVariance(), iterations=3, time_steps=4, batch_size=64, seed=0, progress=False)
    x = sc.Sphere(2).draw((7,), torch.Generator().manual_seed(0))
    u = solution.control(x, 0.5).detach()
    assert float((u * x).sum(1).abs().max()) < 1e-6 < float(u.norm(dim=1).min())
    with pytest.raises(ValueError, match=r"x is off the sphere.*sc.Sphere\(2\).onto\(x\)"):
        solution.control(2 * x, 0.5)


@pytest.mark.parametrize("name", method_names())
def test_methods_take_manifolds_or_refuse_them_by_name(name):
    refused = {"socm", "bridge-matching", "classifier-guidance", "mala", "hmc", "nuts", "auto"}
    method = sc.ClassifierFreeGuidance(lambda x, s, y: x) if name.startswith("classifier-free") else find_method(name)
    if name in refused or name.startswith("classifier-free"):
        with pytest.raises((TypeError, ValueError), match=name):
            method.check(made())
    else:
        method.check(made())


def test_a_reward_that_jumps_where_angles_are_cut_has_no_gradient():
    """Not of an angle, but of its cosine; and of the sphere rewards are asked on the sphere alone."""
    torus, start = sc.ManifoldSDE(sc.Torus(1), sigma=2.0), sc.Dirac(torch.zeros(1, dtype=F64))
    assert "reward" in missing_gradients(sc.ControlProblem(torus, start, lambda x: x[:, 0]))
    assert not missing_gradients(sc.ControlProblem(torus, start, lambda x: x[:, 0].cos()))
    drift = sc.ManifoldSDE(sc.Torus(1), lambda x, t: x, sigma=2.0)
    assert "drift" in missing_gradients(sc.ControlProblem(drift, start, lambda x: x[:, 0].cos()))
    asked = []

    def reward(x):
        asked.append(float((x.detach().norm(dim=1) - 1).abs().max()))
        return x[:, 2]

    assert not missing_gradients(sc.ControlProblem(sc.ManifoldSDE(sc.Sphere(2)), NORTH, reward))
    assert max(asked) < 1e-5
