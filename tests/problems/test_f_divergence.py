"""``FDivergence``: the changed reward's tilted law is the f-divergence optimum; its multiplier is that of the exact
normalisation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import sdecontrol as sc

F64 = torch.float64
ALPHA = 0.7

#: phi and phi' in closed form, written independently of the package
PHI = {
    "kl": (lambda t: t * t.log() - t + 1, lambda t: t.log()),
    "reverse-kl": (lambda t: -t.log() + t - 1, lambda t: 1 - 1 / t),
    "chi-squared": (lambda t: (t - 1) ** 2, lambda t: 2 * (t - 1)),
    "hellinger": (lambda t: 0.5 * (t.sqrt() - 1) ** 2, lambda t: 0.5 * (1 - t.rsqrt())),
    "jensen-shannon": (
        lambda t: 0.5 * (t * (2 * t / (1 + t)).log() + (2 / (1 + t)).log()),
        lambda t: 0.5 * (2 * t / (1 + t)).log(),
    ),
}


def discrete(name: str, reward: Tensor, counts: Tensor, **more) -> sc.FDivergence:
    """On a discrete law: atoms 0, 1, ..., each as often among the samples as ``counts`` says, so that sums over samples
    are exact."""
    atoms = torch.arange(len(reward), dtype=F64).repeat_interleave(counts).unsqueeze(1)
    return sc.FDivergence(lambda x: reward[x[:, 0].long()], name, alpha=ALPHA, samples=atoms, **more)


@pytest.mark.parametrize("name", PHI)
def test_optimum_of_a_discrete_law(name: str) -> None:
    reward = torch.tensor([0.0, 0.3, 1.1, -0.8, 0.5], dtype=F64)
    counts = torch.tensor([5, 3, 1, 4, 7])
    p = counts.double() / counts.sum()
    changed = discrete(name, reward, counts)
    ratio = (changed(torch.arange(5, dtype=F64).unsqueeze(1)) / ALPHA).exp()
    assert float((p * ratio).sum()) == pytest.approx(1.0, abs=1e-12)
    # the condition of stationarity: r - alpha phi'(q/p) is one constant, the multiplier
    level = reward - ALPHA * PHI[name][1](ratio)
    assert torch.allclose(level, torch.full_like(level, changed.multiplier), atol=1e-10)
    # and it is a maximum of E_q[r] - alpha E_p[phi(q/p)] among laws nearby
    value = lambda t: float((p * (t * reward - ALPHA * PHI[name][0](t))).sum())  # noqa: E731
    for seed in range(5):
        move = torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=F64)
        move = move - (p * move).sum()
        assert value(ratio + 0.02 * ratio.min() * move) < value(ratio)


@pytest.mark.parametrize(
    ("order", "name", "alpha"),
    [(0.0, "reverse-kl", ALPHA), (1.0, "kl", ALPHA), (2.0, "chi-squared", ALPHA / 2), (0.5, "hellinger", 4 * ALPHA)],
)
def test_orders_of_the_alpha_divergence(order: float, name: str, alpha: float) -> None:
    """Its members are the named ones, up to the constant factor of each (which is one of the temperature)."""
    x = torch.randn(200, 1, generator=torch.Generator().manual_seed(0), dtype=F64).clamp(-0.3, 0.3)
    r = lambda x: x[:, 0]  # noqa: E731
    one = sc.FDivergence(r, "alpha-divergence", order=order, alpha=ALPHA, samples=x)
    other = sc.FDivergence(r, name, alpha=alpha, samples=x)
    assert torch.allclose(one(x) / ALPHA, other(x) / alpha, atol=1e-9)


def test_kl_gives_the_reward_back() -> None:
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    reward = sc.Quadratic(torch.eye(2, dtype=F64), torch.ones(2, dtype=F64))
    changed = sc.FDivergence(reward, "kl", alpha=ALPHA, samples=x)
    constant = reward(x) - changed(x)
    assert torch.allclose(constant, constant[:1].expand(1000), atol=1e-12)
    exact = ALPHA * (float(torch.logsumexp(reward(x) / ALPHA, 0)) - math.log(1000))
    assert changed.multiplier == pytest.approx(exact, abs=1e-12)
    leaf = x.clone().requires_grad_(True)
    assert torch.allclose(torch.autograd.grad(changed(leaf).sum(), leaf)[0], 1.0 - x, atol=1e-12)


def test_a_function_for_phi() -> None:
    reward, counts = torch.tensor([0.0, 0.3, 1.1], dtype=F64), torch.tensor([2, 2, 2])
    named = discrete("chi-squared", reward, counts)
    own = discrete(lambda y: 1 + y / 2, reward, counts)
    x = torch.arange(3, dtype=F64).unsqueeze(1)
    assert torch.allclose(named(x), own(x), atol=1e-12)


def test_multiplier_of_a_gaussian_within_its_stated_error() -> None:
    """chi-squared and r = x on N(0, 1) without clipping: E[1 + (x - lam)/(2 alpha)] = 1 at lam = 0; stated error
    sd(x)/sqrt(n), seen over 40 sets."""
    z = []
    for seed in range(40):
        x = torch.randn(4000, 1, generator=torch.Generator().manual_seed(seed), dtype=F64)
        changed = sc.FDivergence(lambda x: x[:, 0], "chi-squared", alpha=5.0, samples=x)
        assert changed.multiplier_stderr == pytest.approx(1 / math.sqrt(4000), rel=0.1)
        z.append(changed.multiplier / changed.multiplier_stderr)
    squares = float(torch.tensor(z).square().sum())
    assert 18.0 < squares < 72.0  # chi-squared with 40 degrees of freedom: two-sided error rate 0.3 %


def clipped_exact(alpha: float) -> tuple[float, float, float]:
    """chi-squared, r = x, p = N(0, 1): lam by numerical integration; then mean under q and the clipped fraction."""
    x = torch.linspace(-9, 9, 200_001, dtype=F64)
    p = (-0.5 * x**2).exp()
    p = p / p.sum()
    low, high = -50.0, 50.0
    for _ in range(200):
        lam = 0.5 * (low + high)
        total = float((p * (1 + (x - lam) / (2 * alpha)).clamp(min=0)).sum())
        low, high = (lam, high) if total > 1 else (low, lam)
    q = p * (1 + (x - lam) / (2 * alpha)).clamp(min=0)
    return lam, float((q * x).sum()), float(p[q == 0].sum())


def test_solved_with_the_changed_reward_the_samples_have_the_optimal_law() -> None:
    """An Ornstein-Uhlenbeck process in its stationary law N(0, 1): SMC on the changed reward against the integrated
    law, and log Z = 0."""
    alpha = 0.4
    lam, mean, clipped = clipped_exact(alpha)
    sde = sc.LinearSDE(torch.tensor([[-3.0]], dtype=F64), math.sqrt(6.0) * torch.eye(1, dtype=F64))
    start, reward = sc.Gaussian(torch.zeros(1, dtype=F64), 1.0), lambda x: x[:, 0]
    plain = sc.ControlProblem(sde, start, reward, alpha=alpha, start="controlled")
    x = sc.simulate(plain, 65536, time_steps=20, scheme="exact", seed=0, keep="end").samples
    changed = sc.FDivergence(reward, "chi-squared", alpha=alpha, samples=x, floor=-30 * alpha)
    assert abs(changed.multiplier - lam) < 4 * changed.multiplier_stderr < 0.03
    assert changed.clipped == pytest.approx(clipped, abs=0.01) and clipped > 0.1
    problem = sc.ControlProblem(sde, start, changed, alpha=alpha, start="controlled")
    solution = sc.solve(problem, sc.SMC(num_particles=4096), time_steps=20, scheme="exact", seed=1)
    samples = solution.sample(16384, seed=2)
    evaluation = solution.evaluate(65536, seed=3)
    assert (
        abs(float(samples.mean()) - mean) < 0.05
    )  # 4 standard errors of ~3e3 effective samples; KL's answer would be 2.5, p's 0
    assert abs(evaluation.log_z.value) < 4 * math.hypot(evaluation.log_z.stderr, changed.normalisation_stderr)
    edge = lam - 2 * alpha
    assert float((samples[:, 0] < edge - 0.05).double().mean()) < 1e-3  # nothing where the maximum clips


def test_clipping_needs_a_floor_and_the_floor_has_no_gradient() -> None:
    x = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    with pytest.raises(ValueError, match="floor is missing"):
        sc.FDivergence(lambda x: x[:, 0], "chi-squared", alpha=0.3, samples=x)
    changed = sc.FDivergence(lambda x: x[:, 0], "chi-squared", alpha=0.3, samples=x, floor=-6.0)
    assert changed.clipped > 0.1 and float(changed(x).min()) == -6.0
    leaf = x.clone().requires_grad_(True)
    gradient = torch.autograd.grad(changed(leaf).sum(), leaf)[0]
    assert bool(torch.isfinite(gradient).all())
    assert bool((gradient[changed(x) == -6.0] == 0).all()) and bool((gradient[changed(x) > -5.0] > 0).all())


def test_the_edge_of_the_clip_has_a_gradient_of_zero_and_not_nan() -> None:
    atoms = torch.tensor(
        [[-2.0], [2.0]], dtype=F64
    )  # r = x, alpha = 1, half each: lam = 0, and q/p = 1 + x/2 is exactly 0 and 2
    changed = sc.FDivergence(lambda x: x[:, 0], "chi-squared", alpha=1.0, samples=atoms.repeat(8, 1), floor=-20.0)
    assert changed.multiplier == pytest.approx(0.0, abs=1e-12)
    changed.multiplier = 0.0
    leaf = atoms.clone().requires_grad_(True)
    gradient = torch.autograd.grad(changed(leaf).sum(), leaf)[0]
    assert torch.allclose(gradient, torch.tensor([[0.0], [0.25]], dtype=F64))


def test_a_reward_above_all_samples_is_named() -> None:
    x = torch.randn(100, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    changed = sc.FDivergence(lambda x: x[:, 0], "reverse-kl", alpha=0.1, samples=x)
    with pytest.raises(sc.NonFiniteError, match="infinite in 1 of 2 rows"):
        changed(torch.tensor([[0.0], [50.0]], dtype=F64))


def test_gradient_and_black_box_pass_through() -> None:
    sde, start = sc.OrnsteinUhlenbeck(1), sc.Dirac(torch.zeros(1))
    x = torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    for reward, has in ((lambda x: x[:, 0], True), (lambda x: x[:, 0].detach(), False)):
        changed = sc.FDivergence(reward, "jensen-shannon", alpha=3.0, samples=x)
        assert sc.ControlProblem(sde, start, changed, alpha=3.0).has_gradient is has


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        ({"phi": "chisquared"}, ValueError, "'chi-squared'"),
        ({"phi": 3}, TypeError, "phi must be a name"),
        ({"phi": "alpha-divergence"}, ValueError, "order is missing"),
        ({"order": 2.0}, ValueError, "order goes with"),
        ({"phi": lambda y: 0 * y + 0.5}, ValueError, "no multiplier"),
        ({"alpha": 0.0}, ValueError, "alpha must be > 0"),
        ({"samples": torch.zeros(5)}, ValueError, "samples must have shape"),
        ({"reward": lambda x: x}, ValueError, "reward must return shape|reward"),
        ({"reward": lambda x: x[:, 0] / 0}, sc.NonFiniteError, "not finite in 5 of 5"),
        ({"reward": None}, TypeError, "reward must be a function"),
    ],
)
def test_bad_input(change: dict, kind: type, match: str) -> None:
    arguments = {"reward": lambda x: x[:, 0], "phi": "kl", "alpha": 1.0, "samples": torch.ones(5, 1), **change}
    with pytest.raises(kind, match=match):
        sc.FDivergence(arguments.pop("reward"), arguments.pop("phi"), **arguments)
