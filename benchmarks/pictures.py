"""``python -m benchmarks pictures``: the pictures of ``docs/concepts.md``, drawn from what the package computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sdecontrol as sc

FOLDER = Path(__file__).parents[1] / "docs" / "images"
FREE, OWN, TRUE = "tab:gray", "tab:orange", "black"


def wells(alpha: float = 0.5) -> sc.ControlProblem:
    """Two wells, at -1 and 1; from the left one to the right one."""
    sde = sc.SDE(lambda x, t: 2 * (x - x**3), diffusion=torch.tensor(0.8), dim=1, horizon=1.0)
    return sc.ControlProblem(sde, sc.Dirac(-torch.ones(1)), lambda x: -2 * (x[:, 0] - 1).square(), alpha=alpha)


def histogram(panel: Any, x: Tensor, **how: Any) -> None:
    panel.hist(x.flatten().numpy(), bins=np.linspace(-2.8, 2.8, 57), density=True, histtype="step", **how)


def chain() -> Any:
    """One step of a chain as a law, without control and with it; and a path of such steps."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    x = torch.linspace(-3, 5, 400)
    law = torch.distributions.Normal
    left.plot(x, law(0.0, 1.0).log_prob(x).exp(), color=FREE)
    left.plot(x, law(1.6, 1.0).log_prob(x).exp(), color=OWN)
    left.annotate("", (1.6, 0.41), (0.0, 0.41), arrowprops={"arrowstyle": "->"})
    left.text(0.8, 0.425, "scale$_k$ c$_k$", ha="center")
    left.text(-1.3, 0.3, "free step\nmean$_k$(x$_k$)", ha="right", color=FREE)
    left.text(3.0, 0.3, "controlled step", color=OWN)
    left.set(ylim=(0, 0.47), xticks=[], yticks=[], xlabel="x$_{k+1}$", title="a step is a law")
    problem = wells()
    exact = sc.exact_solution(problem, time_steps=48)
    for control, colour in ((None, FREE), (exact.control, OWN)):
        states = sc.simulate(problem, 5, control, time_steps=48, seed=1, keep="states").states[::4, :, 0]
        right.plot(np.linspace(0, 1, 13), states.numpy(), color=colour, marker=".", linewidth=0.8, alpha=0.9)
    right.set(title="free and controlled paths", xlabel="t", ylabel="x")
    return figure


def gap() -> Any:
    """The law that is wanted and those of three controls; what the bound, log Z and the gap say of each."""
    import matplotlib.pyplot as plt

    problem, figure = wells(), plt.figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    exact = sc.exact_solution(problem, time_steps=50)
    half = lambda x, t: 0.5 * exact.control(x, t)  # noqa: E731
    rows = []
    for name, control, colour in (("none", None, FREE), ("half of it", half, "tab:blue"), ("best", exact.control, OWN)):
        paths = sc.simulate(problem, 4096, control, time_steps=50, seed=0)
        histogram(left, paths.end, color=colour, label=f"control: {name}")
        rows.append((name, float(paths.log_weights().mean()), colour))
    histogram(left, exact.sample(20000, seed=2), color=TRUE, linestyle=":", label="what is wanted")
    left.legend(fontsize=8, loc="upper left")
    left.set(title="the law at the end", xlabel="x", yticks=[])
    log_z = float(exact.log_z)
    for place, (_, elbo, colour) in enumerate(rows):
        right.bar(place, log_z - elbo, bottom=elbo, color=colour, alpha=0.5)
        right.text(place, elbo - 0.05, f"gap {log_z - elbo:.2f}", ha="center", va="top", fontsize=8)
    right.axhline(log_z, color=TRUE)
    right.text(2.4, log_z + 0.2, "log Z", ha="right", va="bottom", fontsize=8)
    right.set(xticks=range(3), xticklabels=[name for name, *_ in rows], title="from the bound to log Z, in nats")
    right.set_ylim(min(elbo for _, elbo, _ in rows) - 1.2, log_z + 1.5)
    return figure


def verdict() -> Any:
    """Weights that are blind: a control that goes to one of two modes has even weights, and log Z is too small."""
    import matplotlib.pyplot as plt

    modes = torch.tensor([[-2.0], [2.0]])
    problem = sc.gibbs_problem(
        lambda x: (-((x - modes.T) ** 2) / 0.18).logsumexp(1), dim=1, reference="brownian", scale=2.0
    )
    one = sc.gibbs_problem(lambda x: -((x[:, 0] - 2) ** 2) / 0.18, dim=1, reference="brownian", scale=2.0)
    control = sc.exact_solution(one, time_steps=50).control
    paths = sc.simulate(problem, 2048, control, time_steps=50, seed=0)
    weights = paths.log_weights()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
    x = np.linspace(-4, 4, 400)
    density = np.exp(-((x[:, None] - modes.numpy().T) ** 2) / 0.18).sum(1) / (2 * np.sqrt(0.18 * np.pi))
    left.plot(x, density, color=TRUE, linestyle=":", label="target")
    left.hist(
        paths.end.flatten().numpy(), bins=60, density=True, color=OWN, alpha=0.5, label="ends of the control's paths"
    )
    left.annotate("nobody has been here", (-2, 0.25), (-3.9, 0.9), arrowprops={"arrowstyle": "->"}, fontsize=9)
    left.legend(fontsize=8, loc="upper right")
    left.set(xlabel="x", yticks=[], ylim=(0, 2.0))
    right.hist(weights.numpy(), bins=np.linspace(-2, 2, 41), color=OWN, alpha=0.5)
    true = float(np.log(2 * np.sqrt(0.18 * np.pi)))
    right.axvline(float(weights.logsumexp(0) - np.log(2048)), color=OWN, label="log Z by these weights")
    right.axvline(true, color=TRUE, linestyle=":", label="log Z")
    right.legend(fontsize=8, loc="upper left")
    right.set(xlabel="log weight of a path", yticks=[])
    return figure


def starts() -> Any:
    """How much of a model's sample its starting noise decides: a little noise on the way, and memoryless noise."""
    import matplotlib.pyplot as plt

    data = sc.GaussianMixture(torch.tensor([0.5, 0.5]), torch.tensor([[-1.5], [1.5]]), torch.full((2, 1, 1), 0.1))
    figure, panels = plt.subplots(1, 3, figsize=(9.5, 3), layout="constrained")
    little = sc.generative_sde(data, sc.FlowMatching(), noise_level=lambda t: 0.1)
    memoryless = sc.generative_sde(data, sc.FlowMatching(), noise_level="memoryless")
    tilt = sc.Linear(torch.tensor([1.5]))
    for panel, (name, sde) in zip(panels, (("little noise", little), ("memoryless noise", memoryless))):
        problem = sc.ControlProblem(sde, reward=tilt, start="fixed")
        paths = sc.simulate(problem, 1500, time_steps=100, seed=0, keep="states")
        panel.scatter(paths.states[0, :, 0], paths.end[:, 0], s=3, color=FREE)
        panel.set(title=f"{name}\nwhere a path began, and ended", xlabel="start", ylabel="end")
    wanted = sc.exact_solution(sc.ControlProblem(memoryless, reward=tilt, start="memoryless"))
    histogram(panels[2], wanted.sample(20000, seed=1), color=TRUE, linestyle=":", label="tilted law")
    free = sc.simulate(
        sc.ControlProblem(memoryless, reward=tilt, start="fixed"), 20000, time_steps=100, seed=2, keep="end"
    )
    histogram(panels[2], free.end, color=FREE, label="model")
    panels[2].legend(fontsize=8, loc="upper left")
    panels[2].set(xlabel="end", yticks=[], title="what the tilt asks for")
    return figure


def pictures() -> None:
    """Draw the pictures of docs/concepts.md.

    Example: python -m benchmarks pictures
    """
    for draw in (chain, gap, verdict, starts):
        place = FOLDER / f"concept_{draw.__name__}.png"
        draw().savefig(place, dpi=100, facecolor="white")
        print(place)
