"""What a piece of work costs: calls of the reward, of its gradient and of the control, seconds, and peak memory."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..controls.base import Control
from ..controls.given import ZeroControl
from ..problems.problem import ControlProblem

__all__ = ["Costs", "Meter"]

_MIB = 2.0**20


@dataclass
class Costs:
    """Of one piece of work. Calls are counted in rows: a call on 256 states is 256.

    Attributes:
        reward_calls: rows of the reward.
        gradient_calls: rows whose gradient of the reward was taken.
        network_calls: rows at which the control was evaluated (again, where a backward pass recomputes it); what a guidance
            simulates inside an evaluation is not counted here. 0 for the reference.
        seconds: CPU seconds of this process, all threads together.
        memory: peak above what was in use at the beginning, MiB: of the allocator on CUDA; on the CPU of the process's resident memory
            (which sees every allocation, in pages); nan where the system does not tell (it does on Linux).
    """

    reward_calls: int = 0
    gradient_calls: int = 0
    network_calls: int = 0
    seconds: float = math.nan
    memory: float = math.nan


class Meter:
    """Counts the calls of one problem's reward and of all controls while it measures; no number changes by it.

    Attributes:
        problem: a copy of the problem whose reward is counted (its own reward function is left as it is, since exact solutions and
            controls look at what it is).
    """

    def __init__(self, problem: ControlProblem) -> None:
        self.costs: Costs | None = None
        self._inside = False
        self.problem = copy.copy(problem)
        call = problem._call_reward

        def counted(x: Tensor, condition: Any) -> Tensor:
            value = call(x, condition)
            if self.costs is not None:
                self.costs.reward_calls += len(x)
                if isinstance(value, Tensor) and value.requires_grad:
                    value.register_hook(functools.partial(self._gradient, len(x)))
            return value

        self.problem._call_reward = counted
        self.reference: Any = problem.reference if problem.reference.reverse_target else None

    @contextlib.contextmanager
    def _watched_score(self) -> Iterator[None]:
        """Annealed Langevin moves by the gradient of the density: counted as one of the reward, each with a call."""
        if self.reference is None:
            yield
            return
        own = self.reference.unbounded_score

        def counted(x: Tensor, condition: Any) -> Tensor:
            if self.costs is not None:
                self.costs.reward_calls += len(x)
                self.costs.gradient_calls += len(x)
            return own(x, condition)

        self.reference.unbounded_score = counted
        try:
            yield
        finally:
            self.reference.unbounded_score = own

    def _gradient(self, rows: int, gradient: Tensor) -> None:
        if self.costs is not None:
            self.costs.gradient_calls += rows

    @contextlib.contextmanager
    def measuring(self) -> Iterator[Costs]:
        """What happens inside is counted, timed and its memory watched; the costs are complete on leaving."""
        costs = Costs()
        memory = _PeakMemory(self.problem.device)
        self.costs, began = costs, time.process_time()
        try:
            with _watched_controls(self._evaluation), self._watched_score():
                yield costs
        finally:
            self.costs = None
            costs.seconds = time.process_time() - began
            costs.memory = memory.peak()

    def _evaluation(self, control: Control, rows: int, work: Callable[[], Tensor]) -> Tensor:
        """Count an evaluation of a control, but not those that it is made of."""
        if self._inside:
            return work()
        if self.costs is not None and not isinstance(control, ZeroControl):
            self.costs.network_calls += rows
        self._inside = True
        try:
            return work()
        finally:
            self._inside = False


@contextlib.contextmanager
def _watched_controls(evaluation: Callable[[Control, int, Callable[[], Tensor]], Tensor]) -> Iterator[None]:
    """Let ``evaluation`` see every evaluation of a control: one state at a time (``at``), step by step (``on_chain``) and at stored
    states (``along``). The classes are watched and not the instances, since controls are copied with all they hold."""

    def at(method: Any) -> Any:
        @functools.wraps(method)
        def watched(self: Control, x: Tensor, *rest: Any, **named: Any) -> Tensor:
            return evaluation(self, x.shape[0], lambda: method(self, x, *rest, **named))

        return watched

    def along(method: Any) -> Any:
        @functools.wraps(method)
        def watched(self: Control, chain: Any, states: Tensor, *rest: Any, **named: Any) -> Tensor:
            rows = states.shape[0] * states.shape[1]
            return evaluation(self, rows, lambda: method(self, chain, states, *rest, **named))

        return watched

    def on_chain(method: Any) -> Any:
        @functools.wraps(method)
        def watched(self: Control, *rest: Any, **named: Any) -> Any:
            shift = method(self, *rest, **named)
            return lambda k, x, y: evaluation(self, x.shape[0], lambda: shift(k, x, y))

        return watched

    watchers = {"at": at, "along": along, "on_chain": on_chain}
    originals: list[tuple[type, str, Any]] = []
    try:
        for cls in _descendants(Control):
            for name, watch in watchers.items():
                if name in vars(cls):
                    originals.append((cls, name, vars(cls)[name]))
                    setattr(cls, name, watch(vars(cls)[name]))
        yield
    finally:
        for cls, name, method in originals:
            setattr(cls, name, method)


def _descendants(cls: type) -> set[type]:
    return {cls}.union(*(_descendants(child) for child in cls.__subclasses__()))


class _PeakMemory:
    """The high-water mark of memory from here on, above what is in use now."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = math.nan
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device) / _MIB
            return
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # else what was freed before would serve again, unseen
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the mark to what is resident now
            self.before = _high_water_mark()

    def peak(self) -> float:
        """MiB; nan where it is not known."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / _MIB - self.before
        return max(_high_water_mark() - self.before, 0.0) if math.isfinite(self.before) else math.nan


def _high_water_mark() -> float:
    """Of this process's resident memory, MiB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return math.nan if found is None else int(found[1]) / 1024
