"""Where a problem has conditions, every function of it is given them, last and by position, whatever its signature; one
that cannot take them is an error that names it and the remedy."""

import functools

import pytest
import torch
from torch import nn

import sdecontrol as sc
from sdecontrol.processes.pretrained import call_model

LABELS = torch.tensor([0, 1])
START = sc.Dirac(torch.zeros(2))


def signed(x, y):
    """Differs from label to label in every entry."""
    return x + (2.0 * y - 1).reshape(-1, 1)


class ClassLabels(nn.Module):
    """As diffusers names its condition: optional, and not y."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x, t, class_labels=None):
        return self.weight * (x if class_labels is None else signed(x, class_labels))


class Context(ClassLabels):
    def forward(self, x, t, context=None, scale=1.0):
        return super().forward(x, t, context) * scale


class Adapter(nn.Module):
    """As adapters wrap a model: everything is handed on."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs)


class Callable:
    def __call__(self, x, t, labels=None):
        return x if labels is None else signed(x, labels)


MODELS = {
    "class_labels=None": ClassLabels,
    "context=None": Context,
    "adapter": lambda: Adapter(ClassLabels()),
    "data-parallel": lambda: nn.DataParallel(ClassLabels()),
    "compiled": lambda: torch.compile(ClassLabels(), backend="eager"),
    "traced": lambda: torch.jit.trace(lambda x, t, y: signed(x, y), (torch.ones(2, 2), torch.ones(2), LABELS)),
    "*args": lambda: lambda *args: signed(args[0], args[2]),
    "partial": lambda: functools.partial(lambda scale, x, t, z=None: scale * signed(x, z), 1.0),
    "object": Callable,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("kind", MODELS)
def test_models_and_drifts_see_the_condition_whatever_their_signature(kind):
    x, y = torch.randn(6, 2), LABELS.repeat(3)
    model, t = MODELS[kind](), torch.tensor(0.5)
    with torch.no_grad():
        assert torch.equal(call_model(model, x, t, y), signed(x, y))
        drift = (lambda x, t, *rest: model(x, t.expand(len(x)), *rest)) if kind == "traced" else model
        made = sc.ControlProblem(sc.SDE(drift, 0.5, dim=2), START, condition=LABELS)
        assert torch.equal(made.reference.drift(x, t, y), signed(x, y))
        paths = sc.simulate(made, 64, condition=LABELS.repeat(32), time_steps=2, seed=0)
    first, second = paths.end[0::2].mean(), paths.end[1::2].mean()
    assert first < -0.5 < 0.5 < second  # the drifts are -1 and 1 at 0


REWARDS = {
    "label=None": lambda x, label=None: x[:, 0] * 0 if label is None else label * x[:, 0],
    "*args": lambda *args: args[1] * args[0][:, 0],
    "keyword of another name": lambda x, target=0.0, scale=1.0: scale * target * x[:, 0],
}


@pytest.mark.parametrize("kind", REWARDS)
def test_rewards_and_densities_see_the_condition_whatever_their_signature(kind):
    made = sc.ControlProblem(sc.BrownianMotion(2, torch.eye(2)), START, REWARDS[kind], condition=LABELS)
    x, y = torch.randn(6, 2), LABELS.repeat(3)
    assert torch.equal(made.reward(x, y), y * x[:, 0])
    cost = sc.ControlProblem(
        made.reference, START, running_cost=lambda x, t, *rest: REWARDS[kind](x, *rest), condition=LABELS
    )
    assert torch.equal(cost.running_cost(x, torch.tensor(0.0), y), y * x[:, 0])
    density = lambda x, *rest: -0.5 * x.square().sum(1) + REWARDS[kind](x, *rest)  # noqa: E731
    target = sc.gibbs_problem(density, 2, scale=1.0, centre=0.0, condition=LABELS)
    assert torch.equal(target.density(x, y), -0.5 * x.square().sum(1) + y * x[:, 0])


def of_drift(f):
    return sc.ControlProblem(sc.SDE(f, 0.5, dim=2), START, condition=LABELS)


def of_model(f):
    return sc.ControlProblem(sc.generative_sde(f, sc.VP(), shape=(2,)), condition=LABELS)


def of_cost(f):
    return sc.ControlProblem(sc.BrownianMotion(2, torch.eye(2)), START, running_cost=f, condition=LABELS)


def of_reward(f):
    return sc.ControlProblem(sc.BrownianMotion(2, torch.eye(2)), START, f, condition=LABELS)


def of_density(f):
    return sc.gibbs_problem(f, 2, scale=1.0, centre=0.0, condition=LABELS)


@pytest.mark.parametrize(
    ("make", "function", "name", "arguments"),
    [
        (of_drift, lambda x, t: x, "drift", "x, t"),
        (of_model, lambda x, s: x, "model", "x, s"),
        (of_cost, lambda x, t: x[:, 0], "running_cost", "x, t"),
        (of_reward, lambda x: x[:, 0], "reward", "x"),
        (of_reward, lambda x, *, label=None: x[:, 0], "reward", "x"),
        (of_density, lambda x: -x.square().sum(1), "log_density", "x"),
    ],
)
def test_what_cannot_take_the_condition_is_refused_by_name(make, function, name, arguments):
    with pytest.raises(
        TypeError, match=rf"{name} failed when called as .*, y\).*lambda {arguments}, y: {name}\({arguments}\)"
    ):
        make(function)
    if arguments == "x" and name == "reward":
        make(lambda x, y: function(x))  # the remedy works
    without = sc.SDE(lambda x, t: x, 0.5, dim=2)  # and without a condition nothing more is passed
    sc.simulate(sc.ControlProblem(without, START), 4, time_steps=2, seed=0)


def test_a_control_that_cannot_take_the_condition_is_refused_by_name():
    made = of_drift(lambda x, t, y: x)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x, t):
            return self.layer(x)

    with pytest.raises(TypeError, match=r"control failed when called as control\(x, t, y\).*lambda x, t, y: control"):
        sc.solve(made, sc.LogVariance(), control=Plain(), iterations=1, time_steps=3, seed=0)


def test_the_library_s_own_functions_ignore_a_condition_that_they_do_not_depend_on():
    linear = sc.LinearSDE(-torch.eye(2), torch.eye(2))
    made = sc.ControlProblem(
        linear, START, sc.Quadratic(torch.eye(2)), running_cost=sc.QuadraticCost(torch.eye(2)), condition=LABELS
    )
    assert len(sc.simulate(made, 8, time_steps=3, seed=0).reward) == 8
    mixture = sc.GaussianMixture(torch.ones(2), torch.eye(2), 1.0)
    made = sc.ControlProblem(sc.generative_sde(mixture, sc.VP()), reward=lambda x, y: y * x[:, 0], condition=LABELS)
    assert len(sc.simulate(made, 8, time_steps=3, seed=0).reward) == 8
