"""Likelihood ratios of every kind of noise, closed-form KL, float32 against float64, and what our own tests can
detect."""

import math

import pytest
import torch
from cases import F64, SmallControl, randn, random_lq
from hypothesis import given, settings
from hypothesis import strategies as st

import sdecontrol as sc
from sdecontrol.randomness import Place, derive_seed


def noise_of(kind, d, m, dtype):
    number, diagonal, matrix = torch.tensor(0.7, dtype=dtype), randn(d, seed=3, dtype=dtype).abs() + 0.3, None
    matrix = randn(d, m, seed=4, dtype=dtype) + torch.eye(d, m, dtype=dtype)
    return {
        "number": 0.7,
        "0-d": number,
        "diagonal": diagonal,
        "matrix": matrix,
        "function of t": lambda x, t: 0.5 + 0.2 * t,
        "diagonal of x": lambda x, t: 0.5 + 0.2 * torch.tanh(x),
        "matrix of x": lambda x, t: matrix + 0.1 * torch.tanh(x[:, :1, None]),
    }[kind]


KINDS = ["number", "0-d", "diagonal", "matrix", "function of t", "diagonal of x", "matrix of x"]


@given(
    kind=st.sampled_from(KINDS),
    d=st.integers(1, 4),
    m=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, F64]),
    cuts=st.lists(st.floats(0.01, 0.99), max_size=6, unique_by=lambda t: round(t, 3)),
    batch=st.integers(1, 80),
    keep=st.sampled_from(["all", "states", "end"]),
)
@settings(max_examples=80, deadline=None)
def test_shapes_dtypes_and_log_ratios_of_any_noise_on_any_grid(kind, d, m, dtype, cuts, batch, keep):
    sigma = noise_of(kind, d, m, dtype)
    sde = sc.SDE(lambda x, t: -x * (1 + t), sigma, dim=d)
    problem = sc.ControlProblem(sde, initial=sc.Gaussian(torch.zeros(d, dtype=dtype), 1.0))
    n = problem.control_shape[0]
    assert n == (m if kind.startswith("matrix") else d)
    u, grid = SmallControl(d, n, dtype=dtype), [0.0, *sorted(cuts), 1.0]
    with torch.no_grad():
        paths = sc.simulate(problem, batch, control=u, time_steps=grid, seed=0, keep=keep)
        ratio, kl, K = paths.log_ratio(), paths.kl(), len(grid) - 1
    assert paths.states.shape == (K + 1, batch, d) and paths.noises.shape == paths.shifts.shape == (K, batch, n)
    assert all(x.dtype == dtype for x in (paths.states, paths.noises, paths.shifts, ratio, kl))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    want = (paths.shifts * (paths.noises + paths.shifts / 2)).sum((0, 2))
    assert torch.allclose(ratio, want, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        assert torch.allclose(paths.log_ratio(u), ratio, rtol=tolerance, atol=tolerance)
    assert torch.allclose(paths.log_ratio(lambda x, t: torch.zeros(len(x), n, dtype=dtype)), 0 * ratio)


def closed_form_kl(A, B, steps):
    """``sum_k h E|B x_k|^2 / 2`` along ``x' = x + h (A + B) x + sqrt(h) xi`` from 0: a recursion for the second
    moment."""
    d, h = len(A), 1 / steps
    second, kl, M = torch.zeros(d, d, dtype=F64), 0.0, torch.eye(d, dtype=F64) + h * (A + B)
    for _ in range(steps):
        kl += 0.5 * h * float((B @ second @ B.mT).trace())
        second = M @ second @ M.mT + h * torch.eye(d, dtype=F64)
    return kl


def z_of_kl(seed, bug=1.0, paths=20_000, steps=10):
    A, B = -torch.eye(2, dtype=F64), 0.5 * randn(2, 2, seed=1)
    problem = sc.ControlProblem(sc.LinearSDE(A, torch.eye(2, dtype=F64)), initial=sc.Dirac(torch.zeros(2, dtype=F64)))
    log_w = sc.simulate(
        problem, paths, control=lambda x, t: x @ B.mT, time_steps=steps, seed=seed, keep="end"
    ).log_ratio()
    log_w = log_w * bug
    return (float(log_w.mean()) - closed_form_kl(A, B, steps)) / (float(log_w.std()) / math.sqrt(paths))


def test_the_mean_log_ratio_is_the_closed_form_kl_of_a_linear_control():
    assert abs(z_of_kl(0, paths=200_000)) < 3


@pytest.mark.parametrize("kind", KINDS)
def test_likelihood_ratios_have_mean_one_for_every_kind_of_noise(kind):
    sde = sc.SDE(lambda x, t: -(x**3), noise_of(kind, 2, 3, F64), dim=2)
    problem = sc.ControlProblem(sde, initial=sc.Dirac(torch.zeros(2, dtype=F64)))
    u = SmallControl(2, problem.control_shape[0])
    with torch.no_grad():
        paths = sc.simulate(problem, 50_000, time_steps=8, seed=1)
        ratio = paths.log_ratio(u).exp()
    assert abs(float(ratio.mean()) - 1) < 3 * float(ratio.std()) / math.sqrt(len(ratio))


@pytest.mark.slow
def test_false_alarms_come_at_the_stated_rate_and_a_bias_of_five_standard_errors_is_seen():
    """200 fresh seeds: |z| > 1.96 in 5 % of them (binomial, 4 standard deviations), and never |z| > 4.5; a log-ratio
    that is planted 5 % too large, five standard errors at 700 000 paths (std 0.295, KL 0.0370), is seen by |z| > 3 in
    at least 95 %."""
    z = [z_of_kl(derive_seed(11, Place.OUTSIDE, i), paths=4000) for i in range(200)]
    alarms = sum(abs(v) > 1.96 for v in z)
    assert abs(alarms - 10) < 4 * math.sqrt(200 * 0.05 * 0.95) and max(map(abs, z)) < 4.5
    seen = [abs(z_of_kl(derive_seed(12, Place.OUTSIDE, i), bug=1.05, paths=700_000)) > 3 for i in range(20)]
    assert sum(seen) >= 19


# ------------------------------------------------------------------------------------------------ precision

REFERENCES = {
    "ornstein-uhlenbeck": lambda dtype: sc.OrnsteinUhlenbeck(2, 1.0, torch.tensor(0.5, dtype=dtype)),
    "brownian motion": lambda dtype: sc.BrownianMotion(2, torch.tensor(1.0, dtype=dtype)),
    "linear": lambda dtype: random_lq(2, seed=3, dtype=dtype).reference,
    "mixture model, VP": lambda dtype: sc.generative_sde(
        sc.GaussianMixture(
            torch.ones(2, dtype=dtype),
            torch.tensor([[-1.0, 0.0], [1.0, 1.0]], dtype=dtype),
            torch.tensor(0.3, dtype=dtype),
        ),
        sc.VP(),
    ),
}


@pytest.mark.parametrize("scheme", ["euler", "exact"])
@pytest.mark.parametrize("name", REFERENCES)
def test_float32_follows_float64_on_the_same_noise_to_one_in_ten_thousand(name, scheme):
    if scheme == "exact" and name.startswith("mixture"):
        pytest.skip("no linear reference")
    noise, ends, ratios = randn(200, 64, 2, seed=1), {}, {}
    start = randn(64, 2, seed=2)
    for dtype in (torch.float32, F64):
        problem = sc.ControlProblem(
            REFERENCES[name](dtype), initial=sc.Gaussian(torch.zeros(2, dtype=dtype), 1.0), start="fixed"
        )
        with torch.no_grad():
            paths = sc.simulate(
                problem,
                64,
                control=SmallControl(2, 2, dtype=dtype),
                time_steps=200,
                scheme=scheme,
                noise=noise.to(dtype),
                state=start.to(dtype),
            )
        ends[dtype], ratios[dtype] = paths.end.double(), paths.log_ratio().double()
    for pair in (ends, ratios):
        assert (pair[torch.float32] - pair[F64]).norm() < 1e-4 * pair[F64].norm()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("steps", [50, 1000])
@pytest.mark.parametrize("variance", [1e-4, 1e-2, 1.0])
def test_near_singular_models_end_finite(dtype, steps, variance):
    gm = sc.GaussianMixture(
        torch.ones(2, dtype=dtype), torch.tensor([[-1.0], [1.0]], dtype=dtype), torch.tensor(variance, dtype=dtype)
    )
    problem = sc.ControlProblem(sc.generative_sde(gm, sc.VP()))
    x = sc.simulate(problem, 64, time_steps=steps, seed=0, keep="end").end
    assert torch.isfinite(x).all() and x.dtype == dtype
