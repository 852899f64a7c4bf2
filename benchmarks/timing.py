"""What the timing benchmarks share: interleaved rounds, one training iteration of a method, and its row beside the
calls that it must make."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import sdecontrol as sc
from sdecontrol.methods.base import Run, parameters_of

__all__ = ["cost_row", "interleaved", "iteration"]


def interleaved(cases: dict[str, Callable[[], Any]], rounds: int, warm: int = 1) -> dict[str, list[float]]:
    """CPU-seconds of each case, round by round, after ``warm`` rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(rounds + warm):
        for name, act in cases.items():
            began = time.process_time()
            act()
            if round_ >= warm:
                seconds[name].append(time.process_time() - began)
    return seconds


def iteration(
    problem: sc.ControlProblem, method: sc.Method, steps: int | None, batch: int, control: Any = None
) -> Callable[[], None]:
    """One iteration of a method with Adam, to be called again and again; steps None: a chain's own; control: as
    of ``solve``."""
    run = Run(problem, problem.chain(steps), batch, 1, 0, control)
    state = method.setup(run)
    optimizer = torch.optim.Adam(parameters_of(state), lr=1e-4, fused=True)

    def descend(*_: Any) -> bool:
        optimizer.step()
        return True

    run.descend = descend

    def act() -> None:
        optimizer.zero_grad(set_to_none=True)
        method.step(state, run)
        run.iteration += 1

    return act


def cost_row(own: Sequence[float], must: Sequence[float], calls: dict[str, float]) -> dict[str, Any]:
    """Medians of the CPU-seconds of a method, of the calls that it must make, and of their ratio within a round."""
    return {
        "cpu_seconds": statistics.median(own),
        "calls": calls,
        "network_calls": statistics.median(must),
        "against_network_calls": statistics.median(a / b for a, b in zip(own, must)),
    }
