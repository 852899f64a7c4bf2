"""How often a model is called: for each step of each path once by whoever needs its prediction, and no more."""

from typing import Any

import pytest
import torch
from torch import nn

import sdecontrol as sc
from sdecontrol.methods import ratio_guidance

K, N = 5, 256
RUN: dict[str, Any] = {"seed": 0, "progress": False}
#: models that a step's law needs beside the control's: (with its likelihood ratio, to draw alone)
CALLS = {
    "tuned copy": (2, 1),
    "network beside a frozen model": (1, 1),
    "network beside a tuned copy": (2, 2),
    "Tweedie guidance": (1, 1),
    "ratio guidance": (1, 1),
    "learned value": (1, 1),
    "classifier-free guidance": (2, 2),
}


class Model(nn.Module):
    """Counts the rows that it and its copies are called with."""

    rows = 0

    def __init__(self, conditional: bool) -> None:
        super().__init__()
        self.layer, self.conditional = nn.Linear(2, 2), conditional

    def forward(self, x: torch.Tensor, s: torch.Tensor, y: Any = None) -> torch.Tensor:
        Model.rows += len(x)
        out = torch.tanh(self.layer(x)) + 0.1 * x
        return out + 0.1 * y if self.conditional else out


def reward(x: torch.Tensor, y: Any = None) -> torch.Tensor:
    return torch.tanh(x if y is None else x + y).sum(1)


def solved(control: str, reference: str, conditions: bool) -> Any:
    torch.manual_seed(0)
    free = control == "classifier-free guidance"
    inner = Model(conditions and not free)
    model: Any = (lambda x, s, y=None: inner(x, s)) if free else inner
    if reference == "sde":
        made: Any = sc.generative_sde(model, sc.VP(), shape=(2,))
    else:
        made = sc.diffusion_chain(model, torch.linspace(0.99, 1e-6, 20), shape=(2,), steps=K + 1)
    y = (lambda n: torch.randn(n, 2)) if conditions else None
    # a high temperature, so that the reference's paths reach the target; and all starts are forgotten
    problem = sc.ControlProblem(made, reward=reward, alpha=5.0, condition=y)
    run = RUN if reference == "chain" else {**RUN, "time_steps": K}
    ways = {"network beside a frozen model": "frozen", "network beside a tuned copy": "both"}
    if control == "tuned copy" or control in ways:
        backprop = sc.RewardBackprop()
        return sc.solve(problem, backprop, control=ways.get(control), iterations=1, batch_size=64, **run)
    if free:
        label = None if conditions else torch.ones(2)
        return sc.solve(problem, sc.ClassifierFreeGuidance(Model(True), label=label), **run)
    if control == "Tweedie guidance":
        return sc.solve(problem, sc.ValueGuidance("tweedie"), **run)
    value = sc.ValueGuidance("ratio" if control == "ratio guidance" else "monte-carlo", num_paths=256)
    return sc.solve(problem, value, iterations=1, **run)


@pytest.mark.filterwarnings("ignore:the value sees r")
@pytest.mark.parametrize("conditions", [False, True], ids=["", "conditions"])
@pytest.mark.parametrize("reference", ["sde", "chain"])
@pytest.mark.parametrize("control", CALLS)
def test_a_model_is_called_once_a_step_by_whom_it_serves(
    control: str, reference: str, conditions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``evaluate``: its paths, with conditions as many again for the normaliser of each, and the reference's paths of
    its second look, where the control is asked too. A chain's last, noiseless step is the reference's one call more."""
    monkeypatch.setattr(ratio_guidance, "STEPS", 20)  # calls are the same of any value
    solution = solved(control, reference, conditions)
    step, alone = CALLS[control]
    last, groups = int(reference == "chain"), 2 if conditions else 1

    def calls(verb: Any) -> float:
        Model.rows = 0
        verb()
        return Model.rows / N

    assert calls(lambda: solution.simulate(N, seed=1)) == K * step
    assert calls(lambda: solution.sample(N, seed=1)) == K * alone + last
    assert calls(lambda: solution.weighted_sample(N, seed=1)) == K * step + last
    assert calls(lambda: solution.evaluate(N, seed=1, confirm=False)) == groups * (K * step + last)
    assert calls(lambda: solution.evaluate(N, seed=1)) == (groups + 1) * (K * step + last)
