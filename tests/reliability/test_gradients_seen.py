"""Everything that carries gradients is probed: where a gradient method would see zeros, or another gradient than the
values have, it refuses by name and names what to take; gradient-free methods run."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import sdecontrol as sc
from sdecontrol.methods import find_method
from sdecontrol.problems.differentiability import CUT, JUMPS, NO_GRAPH, gradient_fault, missing_gradients

START = sc.Dirac(torch.zeros(2))
GRADIENT_METHODS = ("reward-backprop", "adjoint-matching", "socm")


def smooth(x):
    return -(x - 1).square().sum(1)


def zone(x, t):
    return 6.0 * (x[:, 0] > 0.2).to(x.dtype)


def simulator(x, t):
    return torch.as_tensor(-np.sin(x.detach().numpy()))


def problem(drift=lambda x, t: -x, diffusion=1.0, **options):
    return sc.ControlProblem(sc.SDE(drift, diffusion, dim=2), START, **{"reward": smooth, **options})


class Cut(nn.Module):
    """A part of its value is cut off inside."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, x):
        with torch.no_grad():
            part = self.net(x)[:, 0]
        return part + 0.1 * x.sum(1)


FAULTS = {
    "forbidden zone": (lambda: problem(running_cost=zone), {"running_cost": NO_GRAPH}),
    "numpy drift": (lambda: problem(simulator), {"drift": NO_GRAPH}),
    "cut drift": (lambda: problem(lambda x, t: -x + x.detach().sin()), {"drift": CUT}),
    "bang-bang drift": (lambda: problem(lambda x, t: -torch.sign(x)), {"drift": JUMPS}),
    "cut diffusion": (lambda: problem(diffusion=lambda x, t: 1 + 0.5 * x.detach().cos()), {"diffusion": NO_GRAPH}),
    "rounded cost": (lambda: problem(running_cost=lambda x, t: torch.round(3 * x).sum(1)), {"running_cost": JUMPS}),
    "finely rounded": (lambda: problem(reward=lambda x: torch.floor(1e4 * x).sum(1)), {"reward": JUMPS}),
    "smooth and a zone": (
        lambda: problem(running_cost=lambda x, t: x.square().sum(1) + zone(x, t)),
        {"running_cost": JUMPS},
    ),
    "reward under no_grad": (lambda: problem(reward=torch.no_grad()(smooth)), {"reward": NO_GRAPH}),
    "half detached": (lambda: problem(reward=lambda x: smooth(x) + smooth(x + 1).detach()), {"reward": CUT}),
    "a module with no_grad inside": (lambda: problem(reward=Cut()), {"reward": CUT}),
    "two at once": (
        lambda: problem(simulator, reward=lambda x: smooth(x).detach()),
        {"drift": NO_GRAPH, "reward": NO_GRAPH},
    ),
    "model": (
        lambda: sc.ControlProblem(
            sc.generative_sde(torch.no_grad()(lambda x, s: 1.0 * x), sc.VP(), shape=(2,)), reward=smooth
        ),
        {"model": NO_GRAPH},
    ),
    "simulator in numpy": (
        lambda: sc.ControlProblem(
            sc.discrete_dynamics(lambda x, w, k: x + w, steps=5, dim=2, noises=2, numpy=True), START, smooth
        ),
        {"step": NO_GRAPH},
    ),
    "density": (
        lambda: sc.gibbs_problem(lambda x: smooth(x) + x.detach().square().sum(1) / 2, 2, scale=1.0, centre=0.0),
        {"log_density": CUT},
    ),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_has_no_gradient_is_named_with_why_and_what_to_take(kind):
    make, want = FAULTS[kind]
    made = make()
    assert missing_gradients(made) == want
    advice = sc.recommend(made)
    names = [m.name for m in advice.methods]
    assert names and not set(names) & set(GRADIENT_METHODS)
    for name, why in want.items():
        assert f"{name} ({why})" in str(advice)
    own = kind == "simulator in numpy"  # a chain of its own, and no Gaussian one
    for method in GRADIENT_METHODS[: 1 if own else 3]:
        with pytest.raises(sc.NotDifferentiable) as refusal:
            sc.solve(made, method, iterations=1, time_steps=None if own else 5, seed=0)
        text = str(refusal.value)
        assert all(f"{name} has no gradient to go by: {why}" in text for name, why in want.items())
        advised = text.split("needs none (")[1].split(";")[0].split(", ")
        assert set(advised) == set(names)  # the ones that recommend names


def test_gradient_free_methods_run_on_them_and_find_the_truth():
    """The forbidden zone of one dimension: log Z -1.144 by recursion on a grid, at 20 steps."""
    sde = sc.SDE(lambda x, t: -x, 1.0, dim=1)
    made = sc.ControlProblem(sde, sc.Dirac(torch.zeros(1)), lambda x: -0.5 * x[:, 0] ** 2, zone, alpha=1.0)
    solution = sc.solve(made, sc.LogVariance(), time_steps=20, iterations=10, batch_size=128, seed=0)
    log_z = solution.evaluate(4096, seed=1).log_z
    assert abs(log_z.value + 1.144) < 4 * log_z.stderr < 0.2


def test_a_constant_without_a_graph_has_the_right_gradient_zero():
    cost = lambda x, t: 0.5 * x.square().sum(1)  # noqa: E731
    none = problem(reward=lambda x: torch.zeros(len(x)), running_cost=cost)
    assert missing_gradients(none) == {}
    for method in GRADIENT_METHODS:
        options = {"iterations": 3, "time_steps": 5, "batch_size": 64, "seed": 0}
        found = sc.solve(none, method, **options).history
        want = sc.solve(problem(reward=None, running_cost=cost), method, **options).history
        assert [h["objective"] for h in found] == pytest.approx([h["objective"] for h in want], rel=1e-6)
    assert "adjoint-matching" in [m.name for m in sc.recommend(none).methods]


def test_a_reward_that_was_constant_where_it_was_probed_is_refused_where_it_is_not():
    far = problem(reward=lambda x: (x[:, 0] > 3.9).float(), diffusion=0.05)
    assert missing_gradients(far) == {}
    x = torch.tensor([[0.0, 0.0], [5.0, 0.0]])
    assert far.reward(x).tolist() == [0.0, 1.0]
    with pytest.raises(sc.NotDifferentiable, match="reward was asked for with its gradient"):
        far.reward(x.requires_grad_(True))


RANDOM = torch.randn(3, 200, generator=torch.Generator().manual_seed(1))
NO_FAULT = {
    "abs": lambda x: x.abs().sum(1),
    "relu features": lambda x: (x @ RANDOM.to(x)).relu().sum(1),
    "clamp": lambda x: x.clamp(-0.5, 0.5).sum(1),
    "a narrow clamp": lambda x: (1e3 * x).clamp(-1, 1).sum(1),
    "max": lambda x: x.max(1).values,
    "norm": lambda x: x.norm(dim=1),
    "cusp": lambda x: x.abs().sqrt().sum(1),
    "steep": lambda x: torch.sigmoid(1e3 * x).sum(1),
    "offset": lambda x: 1e6 + x.square().sum(1),
    "far hinge": lambda x: (x - 1e6).relu().sum(1),
    "zero": lambda x: torch.zeros(len(x)),
    "random": lambda x: x.sum(1) + torch.randn(len(x)),
    "vector": lambda x: -x.sin(),
    "parts -inf": lambda x: torch.where(x[:, 0] > 0, x.sum(1), -math.inf),
    "own backward": lambda x: torch.nn.functional.softplus(x).sum(1),
}


@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("kind", NO_FAULT)
def test_no_false_alarm_at_kinks_steep_slopes_and_far_values(kind, spread):
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        x = spread * torch.randn(16, 3, generator=generator)
        assert gradient_fault(NO_FAULT[kind], x) is None


def test_no_false_alarm_in_100_networks_of_float32_with_kinks():
    """Float64 refused: differences are taken in float32, across kinks of 512 rectifiers."""
    alarms = 0
    for seed in range(100):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))
        alarms += gradient_fault(lambda x, net=net: net(x)[:, 0], torch.randn(16, 8)) is not None
    assert alarms == 0


class Control(nn.Module):
    def __init__(self, cut):
        super().__init__()
        self.layer, self.cut = nn.Linear(3, 2), cut

    def forward(self, x, t):
        x = x.detach() if self.cut == "state" else x
        u = self.layer(torch.cat((x, t.unsqueeze(1)), 1))
        return u.detach() if self.cut == "output" else u


def test_a_control_without_a_graph_is_refused():
    options = {"iterations": 1, "time_steps": 5, "seed": 0, "batch_size": 64}
    for method in ("adjoint-matching", "log-variance", "reward-backprop"):
        with pytest.raises(sc.NotDifferentiable, match="control has trainable parameters, but"):
            sc.solve(problem(), method, control=Control("output"), **options)
    with pytest.raises(sc.NotDifferentiable, match="reward-backprop differentiates the control by the state"):
        sc.solve(problem(), "reward-backprop", control=Control("state"), **options)
    sc.solve(problem(), "adjoint-matching", control=Control("state"), **options)
    sc.solve(problem(), "reward-backprop", control=Control(None), **options)


def test_values_are_probed_too():
    for value, why in (
        (lambda x, t: x.square().sum(1).detach(), "without a graph"),
        (lambda x, t: Cut()(x), "disagree"),
    ):
        with pytest.raises(sc.NotDifferentiable, match=f"value-guidance needs gradients, but value has .*{why}"):
            sc.solve(problem(), sc.ValueGuidance(value), time_steps=5, seed=0)
    assert find_method("value-guidance").name == "value-guidance"
