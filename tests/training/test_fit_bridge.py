"""``fit_bridge``: targets and optimal drifts against closed forms, a short training, seeds, bad input."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from cases import F64, but_slow, randn, spd
from torch import Tensor, nn

import sdecontrol as sc
from sdecontrol.processes.laws import draw
from sdecontrol.training.fit_bridge import Bridge, BridgeNetwork

D = 2


def references() -> dict:
    root = torch.eye(D, dtype=F64) + 0.3 * randn(D, D, seed=1)
    return {
        "brownian": sc.BrownianMotion(D, sigma=0.8 * torch.eye(D, dtype=F64), horizon=1.3),
        "linear": sc.LinearSDE(0.5 * randn(D, D, seed=0), root, 0.5 * randn(D, seed=2), horizon=0.9),
        "time-dependent": sc.LinearSDE(
            lambda t: (t - 0.5) * torch.eye(D, dtype=F64), lambda t: (1 + t) * torch.eye(D, dtype=F64), horizon=1.0
        ),
    }


def laws(start: str = "gaussian"):
    initial = sc.Dirac(randn(D, seed=3)) if start == "dirac" else sc.Gaussian(randn(D, seed=3), spd(D, 4))
    return initial, sc.Gaussian(randn(D, seed=5) + 1.0, 0.5 * spd(D, 6))


def bridge_of(reference, initial, end) -> Bridge:
    return Bridge(reference, initial.mean, initial.covariance_matrix, end.mean, end.covariance_matrix)


@pytest.mark.parametrize("name", references())
def test_pairs_have_the_reference_s_bridge_and_its_conditioned_drift(name: str) -> None:
    sde = references()[name]
    initial, end = laws()
    x0, xT, noise = randn(1, D, seed=7).expand(9, D), randn(1, D, seed=8).expand(9, D), randn(9, D, seed=9)
    for part in (0.05, 0.4, 0.95):
        t = part * sde.horizon
        at = bridge_of(sde, initial, end).table([t] * 9, x0)
        x, target = at.pair(x0, xT, noise)
        law = sde.bridge(t, x0[0], xT[0])
        assert torch.allclose(at.root[0] @ at.root[0].mT, law.covariance_matrix, atol=1e-9)
        assert torch.allclose(x - noise @ at.root[0].mT, law.mean.expand(9, D), atol=1e-9)
        assert torch.allclose(target, sde.conditioned_drift(x, t, xT), atol=1e-7)


def test_targets_of_a_brownian_motion_by_hand() -> None:
    sde = references()["brownian"]
    x0, xT = randn(4, D, seed=7), randn(4, D, seed=8)
    x, target = bridge_of(sde, *laws()).table([0.5] * 4, x0).pair(x0, xT, randn(4, D, seed=9))
    assert torch.allclose(target, (xT - x) / (1.3 - 0.5), atol=1e-10)


def test_the_limit_of_no_noise_is_flow_matching() -> None:
    """Brownian bridges of falling noise against straight lines: the same states and targets, with an error that falls
    as sigma (and 1/sigma in nothing)."""
    x0, xT, noise = randn(50, D, seed=7), randn(50, D, seed=8), randn(50, D, seed=9)
    line, flow = bridge_of(sc.FlowMatching(), *laws()).table([0.3] * 50, x0).pair(x0, xT, noise)
    assert torch.allclose(line, 0.7 * x0 + 0.3 * xT, atol=1e-12) and torch.allclose(flow, xT - x0, atol=1e-12)
    errors = []
    for sigma in (1e-2, 1e-3):
        sde = sc.BrownianMotion(D, sigma=sigma * torch.eye(D, dtype=F64))
        x, target = bridge_of(sde, *laws()).table([0.3] * 50, x0).pair(x0, xT, noise)
        errors.append((float((x - line).abs().max()), float((target - flow).abs().max())))
    for big, small in zip(*errors):
        assert small == pytest.approx(0.1 * big, rel=1e-3) and small < 5e-3


@pytest.mark.parametrize(
    ("start", "name"),
    but_slow(list(itertools.product(("dirac", "gaussian"), references())), ("dirac", "time-dependent")),
)
def test_the_untrained_drift_of_gaussians_is_the_conditional_mean(name: str, start: str) -> None:
    """The moments of ``dX = (slope X + level) dt + sigma dW`` follow a differential equation: at T they are the data's.
    A drift that is no conditional mean of its target, or a bridge of another process, misses them."""
    from scipy.integrate import solve_ivp

    sde = references()[name]
    initial, end = laws(start)
    bridge = bridge_of(sde, initial, end)

    def slope(t: float, flat):
        at = bridge.table([t], torch.zeros(1, dtype=F64))
        mean, cov = torch.from_numpy(flat[:D].copy()), torch.from_numpy(flat[D:].copy()).reshape(D, D)
        S, root = at.slope[0], torch.from_numpy(sde.coefficients(t)[2])
        moved = S @ cov + cov @ S.mT + root @ root.mT
        return torch.cat((S @ mean + at.level[0], moved.flatten())).numpy()

    begin = torch.cat((initial.mean, initial.covariance_matrix.flatten())).numpy()
    first, last = (1e-9, 0.98 * sde.horizon)
    result = solve_ivp(slope, (first, last), begin, rtol=1e-8, atol=1e-10)
    at = bridge.table([last], torch.zeros(1, dtype=F64))
    assert torch.allclose(torch.from_numpy(result.y[:D, -1]), at.centre[0], atol=1e-5)
    spread = torch.linalg.inv(at.standardiser[0] @ at.standardiser[0])
    assert torch.allclose(torch.from_numpy(result.y[D:, -1]).reshape(D, D), spread, atol=1e-5)
    # and what x_t is near the end: the data, but for what is left of the bridge
    near = bridge.table([sde.horizon * (1 - 1e-5)], torch.zeros(1, dtype=F64))
    assert torch.allclose(near.centre[0], end.mean, atol=1e-3)
    assert torch.allclose(
        torch.linalg.inv(near.standardiser[0] @ near.standardiser[0]), end.covariance_matrix, atol=1e-3
    )


def test_for_a_point_start_it_is_the_optimum_of_the_control_problem() -> None:
    """Theorem 3: the target's bridges are the reference's, so bridge matching to the tilted end law gives
    ``b + sigma u*``, in continuous time."""
    sde = references()["linear"]
    problem = sc.ControlProblem(sde, laws("dirac")[0], sc.Quadratic(spd(D, 10), randn(D, seed=11)), alpha=0.6)
    exact = sc.exact_solution(problem)
    bridge = bridge_of(sde, problem.initial, exact.marginal(sde.horizon))
    x = randn(5, D, seed=12)
    for t in (0.1, 0.5, 0.85):
        at = bridge.table([t], x)
        drift = x @ at.slope[0].mT + at.level[0]
        u = exact.control(x, t)
        root = torch.from_numpy(sde.coefficients(t)[2])
        assert torch.allclose(drift, sde.drift(x, torch.tensor(t, dtype=F64)) + u @ root.mT, atol=1e-6)


def test_the_losses_of_table_2_differ_by_where_the_path_law_stands() -> None:
    """On one Gaussian step with the mean shift c as the only freedom: forward ``KL(Q || P^c)`` and reverse
    ``KL(P^c || Q)`` have one minimiser, the conditional mean of the noise, and different values there unless Q is
    itself a mean shift; with the data's law as Q_fine's end, Q_doob = Q_fine."""
    variance = 0.4  # of the target's noise; the reference's is 1
    mean = 0.9
    q = torch.distributions.Normal(torch.tensor(mean, dtype=F64), math.sqrt(variance))
    kl = torch.distributions.kl_divergence
    c = torch.linspace(-1, 2, 3001, dtype=F64)
    p = torch.distributions.Normal(c, torch.ones_like(c))
    forward, reverse = kl(q, p), kl(p, q)
    assert float(c[forward.argmin()]) == pytest.approx(mean, abs=1e-9) == float(c[reverse.argmin()])
    assert abs(float(forward.min() - reverse.min())) > 0.1
    # the forward loss is the regression of bridge matching: E|c - xi|^2/2 under Q, up to a constant
    regression = 0.5 * ((c - mean) ** 2 + variance)
    assert torch.allclose(forward - forward.min(), regression - regression.min(), atol=1e-12)
    # the reverse one is the control problem's: its curvature is that of Q
    assert torch.allclose(reverse - reverse.min(), 0.5 * (c - mean) ** 2 / variance, atol=1e-12)


def test_a_short_training_keeps_the_closed_form_of_gaussians() -> None:
    sde = sc.OrnsteinUhlenbeck(D, sigma=0.8)
    initial, end = sc.Gaussian(torch.zeros(D), 0.5), sc.Gaussian(torch.tensor([1.0, -0.5]), 0.3)
    data = draw(end, 4096, 0)
    model = sc.fit_bridge(data, sde, initial, iterations=60, seed=0)
    exact = bridge_of(sde, sc.Gaussian(torch.zeros(D, dtype=F64), 0.5), sc.Gaussian(end.mean.double(), 0.3))
    for t in (0.1, 0.5, 0.9):
        at = exact.table([t], torch.zeros(1))
        x = at.centre[0] + torch.randn(500, D, generator=torch.Generator().manual_seed(1)) @ torch.linalg.inv(
            at.standardiser[0]
        )
        with torch.no_grad():
            error = model(x, t) - (x @ at.slope[0].mT + at.level[0])
        assert (
            float((error @ torch.linalg.inv(at.left[0])).square().mean()) < 0.01
        )  # in units of the target's own spread


class Plain(nn.Module):
    """A network without any preconditioning, as a user might write it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(x),)
        return self.layers(torch.cat((x, t[:, None]), 1))


@pytest.mark.parametrize("reference", ["brownian", "flow"])
def test_a_users_model_learns_and_a_copy_is_trained(reference: str) -> None:
    """Data N(0, 1) from a start N(0, 1): the velocity of independent straight lines is (2t - 1) x / ((1-t)^2 + t^2)."""
    process = sc.FlowMatching() if reference == "flow" else sc.BrownianMotion(2, 0.01)  # nearly the same
    mine = Plain()
    before = [p.clone() for p in mine.parameters()]
    data = torch.randn(4096, 2, generator=torch.Generator().manual_seed(0))
    model = sc.fit_bridge(
        data, process, sc.Gaussian(torch.zeros(2), 1.0), mine, iterations=600, learning_rate=5e-3, seed=0
    )
    assert isinstance(model, Plain) and all(torch.equal(p, q) for p, q in zip(mine.parameters(), before))
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(1))
    for t in (0.2, 0.5, 0.8):
        scale = math.sqrt((1 - t) ** 2 + t**2)
        with torch.no_grad():
            velocity = model(scale * x, torch.full((1000,), t))
        assert float((velocity - (2 * t - 1) / scale * x).square().mean().sqrt()) < 0.25


@pytest.mark.slow
def test_it_carries_a_point_to_a_mixture_as_an_sde_and_noise_as_a_flow() -> None:
    mixture = sc.GaussianMixture(torch.tensor([0.5, 0.5]), torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), 0.05)
    data = draw(mixture, 4096, 0)
    point = sc.Dirac(torch.zeros(2))
    drift = sc.fit_bridge(data, sc.BrownianMotion(2), point, iterations=150, seed=0)
    velocity = sc.fit_bridge(data, sc.FlowMatching(), iterations=150, seed=0)
    problems = (
        sc.ControlProblem(sc.SDE(drift, diffusion=1.0, dim=2), point),
        sc.ControlProblem(sc.generative_sde(velocity, sc.FlowMatching(), prediction="velocity", shape=(2,))),
    )
    for problem in problems:
        x = sc.simulate(problem, 2048, time_steps=50, seed=0, keep="end").samples
        # untrained (one Gaussian): above 0.3; two sets of samples: 0.05
        assert sc.metrics.sliced_wasserstein(x, data) < 0.15
        assert float((x[:, 0] > 0).double().mean()) == pytest.approx(0.5, abs=0.06)


def test_times_one_for_all_or_one_per_row_and_shapes() -> None:
    data = torch.randn(64, 2, 3, dtype=F64)
    model = sc.fit_bridge(data, sc.FlowMatching(), iterations=2, batch_size=16, seed=0)
    assert isinstance(model, BridgeNetwork)
    x = torch.randn(5, 2, 3, dtype=F64)
    one = model(x, 0.3)
    assert one.shape == (5, 2, 3)
    assert torch.equal(one, model(x, torch.tensor(0.3, dtype=F64)))
    assert torch.allclose(one, model(x, torch.full((5,), 0.3, dtype=F64)), atol=1e-12)
    mixed = model(x, torch.tensor([0.3, 0.6, 0.3, 0.9, 0.6], dtype=F64))
    assert torch.allclose(mixed[[0, 2]], one[[0, 2]], atol=1e-12)


def test_closed_forms_at_hand_are_bounded_and_change_nothing() -> None:
    """More different times than are kept, in two dtypes, in one call and one by one: the same drift, and no more than
    that many are held."""
    data = torch.randn(64, 1, dtype=F64)
    model = sc.fit_bridge(data, sc.BrownianMotion(1), sc.Dirac(torch.zeros(1)), iterations=1, batch_size=16, seed=0)
    assert isinstance(model, BridgeNetwork) and not model.bridge.known
    t = torch.linspace(0, 0.9, 1100, dtype=F64)
    x = torch.randn(1100, 1, dtype=F64)
    with torch.no_grad():
        together = model(x, t)
        assert len(model.bridge.known) == 1024
        assert torch.equal(together, model(x, t))
        assert torch.allclose(together[:3], torch.cat([model(x[i : i + 1], float(t[i])) for i in range(3)]), atol=1e-12)
        single = copy.deepcopy(model).float()(x[:5].float(), t[:5].float())
    assert single.dtype == torch.float32 and torch.allclose(single.double(), together[:5], atol=1e-4)


def test_same_seed_same_weights_and_the_global_generator_is_left_alone() -> None:
    data, state = torch.randn(64, 2), torch.get_rng_state()
    starts = torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
    runs = [sc.fit_bridge(data, sc.BrownianMotion(2), starts, iterations=5, seed=s).state_dict() for s in (3, 3, 4)]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])
    assert any(not torch.equal(runs[0][k], runs[2][k]) for k in runs[0])


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        ({"data": torch.zeros(5)}, ValueError, "data must have shape"),
        ({"data": torch.full((5, 2), float("nan"))}, ValueError, "data has 10 non-finite"),
        ({"data": torch.zeros(5, 3)}, ValueError, "data has events of shape"),
        ({"reference": sc.VP()}, TypeError, "reference must be a linear SDE"),
        ({"initial": None}, TypeError, "initial is missing"),
        ({"initial": sc.Dirac(torch.zeros(3))}, ValueError, "initial gives states of shape"),
        ({"initial": 3}, TypeError, "initial must be a law"),
        ({"iterations": 0}, ValueError, "iterations must be an int >= 1"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be > 0"),
        ({"model": nn.Flatten()}, ValueError, "no trainable parameters"),
        ({"model": lambda x, t: x}, TypeError, "model must be an nn.Module"),
    ],
)
def test_bad_input(change: dict, kind: type, match: str) -> None:
    arguments = {
        "data": torch.randn(5, 2),
        "reference": sc.BrownianMotion(2),
        "initial": sc.Dirac(torch.zeros(2)),
        "iterations": 1,
        **change,
    }
    with pytest.raises(kind, match=match):
        sc.fit_bridge(arguments.pop("data"), arguments.pop("reference"), arguments.pop("initial"), **arguments)
