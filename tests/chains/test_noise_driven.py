"""A user's own simulator as a chain: against the SDE that it is in another form, and against quadrature where it is
none."""

import math

import numpy as np
import pytest
import torch
from cases import F64, SmallControl, randn, slow_but
from torch import nn

import sdecontrol as sc
from sdecontrol.methods.base import find_method, method_names
from sdecontrol.paths.gradients import Objective, backpropagate
from sdecontrol.randomness import SuppliedNoise

K, H = 8, 0.1
A = torch.tensor([[-0.5, 0.3], [0.1, -0.2]], dtype=F64)
SIGMA = torch.tensor([[0.4, 0.0], [0.2, 0.7]], dtype=F64)


def reward(x):
    return -(x - 0.5).square().sum(1)


def cost(x, t):
    return 0.3 * x[:, 0].square()


def euler(x, w, k):
    return x + H * x @ A.T + math.sqrt(H) * w @ SIGMA.T


def pair(alpha=0.5):
    """The same chain twice: an SDE on its grid, and a simulator whose unit of time is a step."""
    start = sc.Gaussian(torch.tensor([0.2, -0.1], dtype=F64), 0.3)
    sde = sc.LinearSDE(A, SIGMA, horizon=K * H)
    one = sc.ControlProblem(sde, start, reward, cost, alpha)
    two = sc.ControlProblem(
        sc.discrete_dynamics(euler, K, dim=2, noises=2), start, reward, lambda x, t: H * cost(x, t), alpha
    )
    return one, two


class Slow(nn.Module):
    """A control of the SDE's time as one of the simulator's: ``c = sqrt(h) u(x, h k)``."""

    def __init__(self, control):
        super().__init__()
        self.control = control

    def forward(self, x, t):
        return math.sqrt(H) * self.control(x, H * t)


def test_a_simulator_that_is_an_euler_step_is_the_euler_chain():
    one, two = pair()
    control = SmallControl(2, 2)
    a = sc.simulate(one, 96, control, time_steps=K, seed=3)
    b = sc.simulate(two, 96, Slow(control), seed=3)
    other = SmallControl(2, 2, seed=5)
    for get in (
        lambda p: p.states,
        lambda p: p.shifts,
        lambda p: p.running_cost,
        lambda p: p.log_ratio(),
        lambda p: p.kl(per_step=True),
        lambda p: p.log_weights(),
    ):
        assert torch.allclose(get(a), get(b), atol=1e-12)
    assert torch.allclose(a.log_ratio(other), b.log_ratio(Slow(other)), atol=1e-12)
    ends = sc.simulate(two, 96, Slow(control), seed=3, keep="end", chunk=64)
    assert torch.equal(ends.end, b.end) and torch.allclose(ends.log_weights(), b.log_weights(), atol=1e-12)


def test_gradients_through_a_simulator_are_those_of_the_euler_chain():
    found = {}
    for name, problem in zip(("sde", "simulator"), pair()):
        control = SmallControl(2, 2)
        used = control if name == "sde" else Slow(control)
        chain = problem.chain(K) if name == "sde" else problem.chain()
        noise = randn(K, 16, 2, seed=7)
        for mode in ("full", "adjoint", "checkpoint"):
            for p in control.parameters():
                p.grad = None
            objective = Objective(lambda x: -reward(x) / 0.5, problem.running_cost_or_none, 0.5)
            parameters = list(control.parameters())
            backpropagate(
                chain, used, randn(16, 2, seed=8), SuppliedNoise(noise), objective,
                parameters=parameters, mode=mode,
            )  # fmt: skip
            found[name, mode] = torch.cat([p.grad.flatten() for p in parameters])
    want = found["sde", "full"]
    assert float(want.abs().max()) > 1e-2
    assert all(torch.allclose(have, want, atol=1e-12) for have in found.values())


def folded(x, w, k):
    """No Gaussian kernel: the noise enters by its size, and the state bounces off 0."""
    return (0.8 * x + 0.5 * w.abs() - 0.3).abs()


def test_weights_of_a_map_that_is_no_kernel_are_exact_against_quadrature():
    """``log Z`` by recursion with Gauss-Hermite nodes split at 0, where the map has its kink, for any control (4
    standard errors: false alarm 6e-5 each)."""
    problem = sc.ControlProblem(
        sc.discrete_dynamics(folded, steps=3, dim=1, noises=1),
        sc.Dirac(torch.tensor([0.5], dtype=F64)),
        lambda x: -2 * (x[:, 0] - 1).square(),
        alpha=0.7,
    )
    nodes, weights = np.polynomial.legendre.leggauss(60)
    half = 4.5 * (nodes + 1)  # |w| in (0, 9), density 2 phi
    mass = torch.tensor(4.5 * weights * 2 * np.exp(-(half**2) / 2) / math.sqrt(2 * math.pi), dtype=F64)
    w = torch.tensor(half, dtype=F64)

    def psi(x, k):
        if k == 3:
            return (-2 * (x - 1).square() / 0.7).exp()
        after = folded(x.unsqueeze(1), w.unsqueeze(0), k)
        return psi(after.flatten(), k + 1).reshape(after.shape) @ mass

    log_z = float(psi(torch.tensor([0.5], dtype=F64), 0).log())
    for control in (None, lambda x, t: 0.7 - 0.4 * x):
        paths = sc.simulate(problem, 1 << 15, control, seed=4)
        ratio = paths.log_weights().exp() / math.exp(log_z)
        assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / len(ratio) ** 0.5
    found = sc.solve(problem, sc.SMC(num_particles=512), seed=0).evaluate(8192, seed=1)
    assert abs(found.log_z.value - log_z) < 4 * found.log_z.stderr


METHODS = {
    "adjoint-matching": sc.AdjointMatching(),
    "reward-backprop": sc.RewardBackprop(),
    "soft-ppo": sc.SoftPPO(),
    "log-variance": sc.LogVariance(),
    "path-consistency": sc.PathConsistency(),
    "path-consistency, 2 steps": sc.PathConsistency(2),
    "cross-entropy": sc.CrossEntropy(),
    "reward-weighted-mle": sc.RewardWeightedMLE(),
    "reinforce": sc.Reinforce(),
    "particle-matching": sc.ParticleMatching(num_particles=256),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", slow_but(METHODS, "adjoint-matching", "log-variance", "reinforce", "particle-matching")
)
def test_every_method_of_noises_trains_on_a_simulator(name):
    """The gap falls to less than a third of the reference's."""
    _, problem = pair()
    none = sc.simulate(problem, 2048, seed=9)
    log_z = float(none.log_weights().logsumexp(0)) - math.log(2048)
    reference_gap = log_z - float(none.log_weights().mean())
    solution = sc.solve(problem, METHODS[name], iterations=60, batch_size=64, seed=0, progress=False)
    found = solution.evaluate(2048, seed=1)
    assert found.gap.value < reference_gap / 3


@pytest.mark.parametrize("name", method_names())
def test_methods_take_simulators_or_refuse_them_by_name(name):
    """Whatever is not about noises says so before anything runs, and without a gradient those that need one do."""
    _, smooth = pair()
    rough = sc.ControlProblem(
        sc.discrete_dynamics(lambda x, w, k: np.abs(x) + 0.1 * w, K, 2, 2, numpy=True), smooth.initial, reward
    )
    method = sc.ClassifierFreeGuidance(lambda x, s, y: x) if name.startswith("classifier-free") else find_method(name)
    for problem in (smooth, rough):
        try:
            method.check(problem)
        except (ValueError, TypeError, sc.NotDifferentiable) as error:
            assert name in str(error) and len(str(error)) > 40
    if method.needs_gradient:
        with pytest.raises((ValueError, sc.NotDifferentiable)):
            method.check(rough)


def test_numpy_simulators_have_the_numbers_of_torch_ones():
    problem = pair()[1]
    plain = sc.discrete_dynamics(
        lambda x, w, k: x + H * x @ A.numpy().T + math.sqrt(H) * w @ SIGMA.numpy().T, K, 2, 2, numpy=True
    )
    same = sc.ControlProblem(plain, problem.initial, reward, problem.running_cost_function, problem.alpha)
    a, b = (sc.simulate(p, 64, seed=1) for p in (problem, same))
    assert torch.allclose(a.states, b.states, atol=1e-14)
    runs = [sc.solve(p, sc.LogVariance(), iterations=5, batch_size=64, seed=0, progress=False) for p in (problem, same)]
    assert torch.allclose(*(r.sample(64, seed=2) for r in runs), atol=1e-9)


def test_a_simulators_solution_is_saved_and_resumed(tmp_path):
    problem = pair()[1]
    options = {"batch_size": 64, "seed": 0, "progress": False}
    whole = sc.solve(problem, sc.LogVariance(), iterations=6, **options)
    whole.save(tmp_path / "run")
    again = sc.load(tmp_path / "run", problem)
    assert torch.equal(whole.sample(64, seed=1), again.sample(64, seed=1))
    other = sc.ControlProblem(sc.discrete_dynamics(lambda x, w, k: x + w, K, 2, 2), problem.initial, reward, alpha=0.5)
    with pytest.raises(sc.BadFileError, match="another problem"):
        sc.load(tmp_path / "run", other)


def random_inside(x, w, k):
    return x + w + torch.rand_like(x)


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(
    ("step", "error", "match"),
    [
        (lambda x, w, k: (x + w)[:, :1], ValueError, r"step must return shape \(5, 2\)"),
        (lambda x, w, k: (x + w).float(), TypeError, "step returned dtype"),
        (lambda x, w, k: (x + w).numpy(), TypeError, "numpy=True"),
        (lambda x, w: x + w, TypeError, r"step failed when called as step\(x, w, k\)"),
        (random_inside, ValueError, "no random numbers of its own"),
        (3.0, TypeError, "step must be a function"),
    ],
)
def test_a_wrong_simulator_is_named_at_once(step, error, match):
    with pytest.raises(error, match=match):
        sc.ControlProblem(sc.discrete_dynamics(step, 4, 2, 2), sc.Dirac(torch.zeros(2, dtype=F64)), reward)


def test_a_step_that_is_not_finite_is_named():
    problem = sc.ControlProblem(
        sc.discrete_dynamics(lambda x, w, k: x.log() + w if k == 2 else x + w, 4, 1, 1),
        sc.Dirac(torch.tensor([-50.0], dtype=F64)),
        lambda x: -x[:, 0].square(),
    )
    with pytest.raises(sc.NonFiniteError, match=r"step is not finite at step 2 of 4 .* in 64 rows"):
        sc.simulate(problem, 64, seed=0)


@pytest.mark.parametrize("name", ["steps", "dim", "noises"])
def test_counts_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be an int >= 1"):
        sc.discrete_dynamics(euler, **{"steps": 3, "dim": 2, "noises": 2, name: 0})


def test_a_learned_start_before_a_simulator():
    """A Gaussian start made part of the control: weights stay exact for its own law, of any control (4 standard
    errors)."""
    sde, _ = (p.reference for p in pair())
    start, alpha = sc.Gaussian(torch.tensor([0.2, -0.1], dtype=F64), 0.3), 0.5
    quadratic = sc.Quadratic(G=torch.eye(2, dtype=F64), g=torch.ones(2, dtype=F64))
    exact = sc.exact_solution(sc.ControlProblem(sde, start, quadratic, alpha=alpha, start="controlled"), time_steps=K)
    problem = sc.ControlProblem(sc.discrete_dynamics(euler, K, 2, 2), start, quadratic, alpha=alpha, start="controlled")
    chain = problem.chain()
    assert chain.start == 5 and not chain.gaussian and chain.main.steps == K
    for control in (None, sc.solve(problem, sc.LogVariance(), iterations=60, seed=0, progress=False).control):
        ratio = (sc.simulate(problem, 1 << 14, control, seed=2).log_weights() - float(exact.log_z)).exp()
        assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / 128
