"""The diffusion on the simplex: marginals against the exact moments of Jacobi diffusions, paths that stay, and the
control that is a time reversal."""

import math

import numpy as np
import pytest
import torch
from cases import F64

import sdecontrol as sc
from sdecontrol.library import SimplexDiffusion
from sdecontrol.library.simplex import stick_moments


@pytest.fixture
def double():
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def jacobi_density(v, v0, b, elapsed, terms=60):
    """The transition density by Jacobi polynomials (Karlin & Taylor 1981, chapter 15)."""
    from scipy.special import eval_jacobi

    n = np.arange(terms)[:, None]
    norm = (2 * n + b) / b  # of P_n^(b-1,0) under Beta(1, b)
    p, p0 = eval_jacobi(n, b - 1, 0, 2 * v - 1), eval_jacobi(n, b - 1, 0, 2 * v0 - 1)
    return b * (1 - v) ** (b - 1) * (norm * np.exp(-0.5 * n * (n + b) * elapsed) * p * p0).sum(0)


@pytest.mark.parametrize(("b", "v0"), [(1, 0.1), (3, 0.4), (2, 1.0), (3, 0.0)])
def test_moments_are_those_of_the_density_by_jacobi_polynomials(b, v0):
    x, w = np.polynomial.legendre.leggauss(400)
    v, w = 0.5 * (1 + x), 0.5 * w
    density = jacobi_density(v, v0, b, 0.4)
    expected = [float((w * density) @ v**n) for n in range(6)]
    assert np.allclose(stick_moments(v0, b, 0.4, 5), expected, atol=1e-9)
    assert np.allclose(stick_moments(v0, b, 60.0, 2)[1:], [1 / (1 + b), 2 / ((1 + b) * (2 + b))])  # Beta(1, b)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("start", [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.2, 0.5, 0.2, 0.1]])
def test_marginals_of_the_chain_are_those_of_the_transition_law(start):
    process, n = SimplexDiffusion(1, 4, speed=1.5, horizon=0.4), 40000
    at = process.from_points(torch.tensor([start]))
    problem = sc.ControlProblem(process, initial=sc.Dirac(at), reward=lambda x: process.points(x)[:, 0, 0])
    v = process.sticks(sc.simulate(problem, n, time_steps=50, seed=0).states[-1])
    for j, b in enumerate((3, 2, 1)):
        exact = stick_moments(float(process.sticks(at)[0, j]), b, 1.5 * 0.4, 3)
        for power, bias in ((1, 0.0), (2, 2e-3), (3, 2e-3)):
            found = v[:, 0, j] ** power
            assert abs(float(found.mean()) - exact[power]) < 4 * float(found.std()) / math.sqrt(n) + bias


@pytest.mark.usefixtures("double")
def test_no_path_of_any_control_leaves_the_simplex_and_eulers_in_sticks_do():
    process = SimplexDiffusion(2, 3)
    problem = sc.ControlProblem(process, reward=lambda x: process.points(x)[:, 0, 0])
    for control in (None, lambda x, t: 50 * torch.ones_like(x)):
        states = sc.simulate(problem, 512, control=control, time_steps=20, seed=0).states
        p = process.points(states)
        assert float(p.min()) >= 0 and float((p.sum(-1) - 1).abs().max()) < 1e-12
    sticks = sc.SDE(
        lambda v, t: 0.5 * (1 - 3 * v), lambda v, t: (v * (1 - v)).clamp(min=0).sqrt(), dim=1, horizon=1.0
    )  # b = 2
    inside = sc.ControlProblem(sticks, initial=sc.Dirac(torch.tensor([0.1])), reward=lambda v: v[:, 0])
    v = sc.simulate(inside, 4096, time_steps=100, seed=0).states[..., 0]
    out = ((v < 0) | (v > 1)).any(0).double().mean()
    assert 0.2 < float(out) < 0.6  # of paths; the way of the tutorial's code


@pytest.mark.usefixtures("double")
def test_the_stationary_law_is_uniform_and_stays():
    process, n = SimplexDiffusion(1, 3, horizon=1.0), 20000
    problem = sc.ControlProblem(process, reward=lambda x: process.points(x)[:, 0, 0])
    states = sc.simulate(problem, n, time_steps=25, seed=1).states[:, :, 0]
    assert float(states[0].mean(0)[0]) == pytest.approx(float(process.own_initial.mean[0, 0]), abs=0.02)
    for x in (states[0], states[-1]):
        p = process.points(x)
        assert torch.allclose(p.mean(0), torch.full((3,), 1 / 3), atol=0.01)
        assert torch.allclose(p.square().mean(0), torch.full((3,), 1 / 6), atol=0.01)  # Dirichlet(1, 1, 1)
    z = torch.linspace(1e-4, math.pi - 1e-4, 4001)
    grid = torch.stack(torch.meshgrid(z[::40], z[::40], indexing="ij"), -1).reshape(-1, 1, 2)
    mass = process.own_initial.log_prob(grid).exp().sum() * float(z[40] - z[0]) ** 2
    assert float(mass) == pytest.approx(1.0, abs=0.01)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("speed", [0.5, 2.0])
def test_the_square_of_the_noise_reverses_time_and_its_cube_does_not(speed):
    """Data of the density w(v) = 2 v on two letters: the control is sqrt(speed) d/dphi log E[v_T | phi]."""
    process, n = SimplexDiffusion(1, 2, speed=speed, horizon=6 / speed), 20000

    def control(x, t, power=1.0):
        left = torch.exp(-speed * (process.horizon - t)).reshape(-1, *[1] * (x.ndim - 1))
        mean = 0.5 + (process.sticks(x) - 0.5) * left  # E[v_T | phi]
        return speed ** (0.5 * power) * 0.5 * x.sin() * left / mean

    problem = sc.ControlProblem(process, reward=lambda x: process.sticks(x)[:, 0, 0])

    def end(power):
        u = lambda x, t: control(x, t, power)  # noqa: E731
        return process.sticks(sc.simulate(problem, n, control=u, time_steps=200, seed=0).samples)[:, 0, 0]

    v = end(1.0)
    error = 4 * float(v.std()) / math.sqrt(n) + 3e-3
    assert float(v.mean()) == pytest.approx(2 / 3, abs=error)
    assert float(v.square().mean()) == pytest.approx(1 / 2, abs=error)
    assert abs(float(end(2.0).mean()) - 2 / 3) > 0.02  # g^3 where g^2 belongs


@pytest.mark.usefixtures("double")
def test_points_and_angles_are_the_same():
    process = SimplexDiffusion(3, 5)
    p = torch.rand(7, 3, 5).softmax(-1)
    assert torch.allclose(process.points(process.from_points(p)), p, atol=1e-12)
    letters = torch.eye(5).expand(3, 5, 5).transpose(0, 1)
    assert torch.allclose(process.points(process.from_points(letters)), letters, atol=1e-12)
    with pytest.raises(ValueError, match="points must be probabilities"):
        process.from_points(2 * p)
    with pytest.raises(ValueError, match="points must have shape"):
        process.from_points(p[:, :2])
    with pytest.raises(ValueError, match="categories"):
        SimplexDiffusion(3, 1)
    with pytest.raises(ValueError, match="v0 must be between 0 and 1"):
        stick_moments(1.2, 1, 1.0, 2)


@pytest.mark.slow
def test_a_tuned_diffusion_on_the_simplex_comes_near_the_optimum():
    """``r = 4 p_1``, p_1 from Beta(1, 2) without control: ``Z = int 2 (1 - p) e^{4 p} dp``."""
    process = SimplexDiffusion(1, 3)
    problem = sc.ControlProblem(process, reward=lambda x: 4 * process.points(x)[:, 0, 0])
    log_z = math.log(2 * (math.exp(4) - 5) / 16)
    options = {"time_steps": 40, "iterations": 60, "batch_size": 64, "seed": 0, "progress": False}
    for method in (sc.AdjointMatching(), sc.LogVariance()):
        found = sc.solve(problem, method, **options).evaluate(2048, seed=1, confirm=False)
        assert (
            abs(found.log_z.value - log_z) < 4 * found.log_z.stderr + 0.04
        )  # second moments have a bias, 0.004 at these steps
        assert found.gap.value < 0.15 * (log_z - 4 / 3), method  # of no control
