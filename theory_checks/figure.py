"""One figure: orders of convergence, marginals against theory, the bias of a fixed start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import sdecontrol as sc

from .cases import LinearCase

__all__ = ["draw"]


def _case(**changes: Any) -> LinearCase:
    """One dimension: an Ornstein-Uhlenbeck process that is pulled upwards."""
    one = np.ones((1, 1))
    case = LinearCase(
        A=-0.6 * one,
        slope=0 * one,
        offset=np.zeros(1),
        sigma=0.8 * one,
        mean=np.zeros(1),
        cov=0.7 * one,
        G=1.2 * one,
        g=np.array([2.0]),
        F=None,
        alpha=0.8,
        grid=tuple(np.linspace(0, 1, 17)),
    )
    return replace(case, **changes)


def _convergence(axis: Any) -> None:
    case, steps = _case(), np.array([4, 8, 16, 32, 64, 128, 256])
    exact = sc.exact_solution(case.problem())
    chains = [sc.exact_solution(case.problem(), time_steps=int(K)) for K in steps]
    h = 1 / steps
    for label, errors in (
        ("|log Z error|", [abs(float(c.log_z - exact.log_z)) for c in chains]),
        ("|mean of X_T error|", [abs(float((c.marginal(1.0).mean - exact.marginal(1.0).mean)[0])) for c in chains]),
        ("floor of the Euler chain (KL)", [float(c.floor) for c in chains]),
    ):
        axis.loglog(h, errors, "o-", label=label)
    axis.loglog(h, 0.2 * h, "k:", label="order 1")
    axis.set(title="Chains approach continuous time", xlabel="step size h", ylabel="error")
    axis.legend()


def _density(mean: Any, cov: Any, x: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * (x - float(mean[0])) ** 2 / float(cov[0, 0])) / np.sqrt(2 * np.pi * float(cov[0, 0]))


def _marginals(axis: Any, seed: int) -> None:
    case, x = _case(), np.linspace(-2.5, 3.5, 400)
    answers, reference = case.chain(), case.reference()
    log_z = case.optimum()[1]
    paths = sc.simulate(case.problem(), 20_000, control=answers.exact.control, seed=seed)
    for k, colour in zip((0, 8, 16), ("C0", "C1", "C2")):
        theory = np.exp(case.value(k, x[:, None]) / case.alpha + reference.of(k).log_prob(x[:, None]) - log_z)
        axis.hist(paths.states[k - 17, :, 0].numpy(), bins=80, density=True, color=colour, alpha=0.3)
        axis.plot(x, theory, color=colour, label=f"exp(v/alpha) p0 / Z at t = {case.grid[k]:g}")
    axis.set(title="Theorem 2: marginals (bars: best mean-shift control)", xlabel="x", ylabel="density", ylim=(0, 1.15))
    axis.legend(loc="upper left")


def _fixed_start(axis: Any, seed: int) -> None:
    case, x = _case(A=-0.1 * np.ones((1, 1))), np.linspace(-2.5, 3.5, 400)
    p_r = case.chain().exact.marginal(1.0)
    fixed = replace(case, start="fixed").chain().exact
    biased = fixed.marginal(1.0)
    axis.hist(fixed.sample(20_000, seed=seed)[:, 0].numpy(), bins=80, density=True, color="C3", alpha=0.3)
    axis.plot(x, _density(p_r.mean, p_r.covariance_matrix, x), "C0", label="p_r (start controlled)")
    axis.plot(x, _density(biased.mean, biased.covariance_matrix, x), "C3", label="start fixed: the known bias")
    axis.set(title="A fixed start biases the end", xlabel="x", ylabel="density", ylim=(0, 0.9))
    axis.legend(loc="upper left")


def draw(path: Path, seed: int = 0) -> Any:
    """Write the figure to a file; returns figure and axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    axes = figure.subplots(1, 3)
    _convergence(axes[0])
    _marginals(axes[1], seed)
    _fixed_start(axes[2], seed)
    figure.savefig(path, dpi=120)
    return figure, axes
