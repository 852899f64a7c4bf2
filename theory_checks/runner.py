"""Runs checks with their negative controls, in one process or several."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import torch

from sdecontrol.problems.workers import end_with_parent

from .registry import Check, Measurement, Setting, all_checks

__all__ = ["ControlOutcome", "Outcome", "run", "run_check"]


@dataclass(frozen=True)
class ControlOutcome:
    """One negative control: its worst measurement, and whether it failed as it must (``error``: it broke down
    instead)."""

    defect: str
    worst: Measurement | None
    error: str = ""

    @property
    def caught(self) -> bool:
        return not self.error and self.worst is not None and not self.worst.passed


@dataclass(frozen=True)
class Outcome:
    """One check with its controls."""

    name: str
    statement: str
    kind: str
    doc: str
    measurements: tuple[Measurement, ...]
    controls: tuple[ControlOutcome, ...]
    seconds: float
    error: str = ""

    @property
    def holds(self) -> bool:
        """The statement was measured to hold."""
        return not self.error and all(m.passed for m in self.measurements)

    @property
    def passed(self) -> bool:
        """The statement holds, and every negative control failed."""
        return self.holds and all(c.caught for c in self.controls)

    @property
    def worst(self) -> Measurement | None:
        return max(self.measurements, key=lambda m: m.severity) if self.measurements else None


def run_check(check: Check, setting: Setting, controls: bool = True) -> Outcome:
    """Run one check and its negative controls; what breaks down is an error, not a failed control."""
    began, found, error = time.perf_counter(), (), ""
    with torch.random.fork_rng(devices=[]):
        try:
            found = tuple(check.measure(setting))
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
        outcomes = tuple(_run_control(check, setting, defect) for defect in check.controls) if controls else ()
    return Outcome(
        check.name, check.statement, check.kind, check.doc, found, outcomes, time.perf_counter() - began, error
    )


def _run_control(check: Check, setting: Setting, defect: str) -> ControlOutcome:
    try:
        found = check.measure(setting, defect)
    except Exception as problem:
        return ControlOutcome(defect, None, f"{type(problem).__name__}: {problem}")
    return ControlOutcome(defect, max(found, key=lambda m: m.severity))


def _run_by_name(name: str, setting: Setting, controls: bool) -> Outcome:
    torch.set_num_threads(1)
    return run_check(next(c for c in all_checks() if c.name == name), setting, controls)


def run(
    checks: Sequence[Check],
    setting: Setting,
    *,
    workers: int = 1,
    controls: bool = True,
    progress: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Run checks, in the order given; with ``workers`` > 1 each in one of so many processes of one thread."""
    done: dict[str, Outcome] = {}
    if workers <= 1:
        for check in checks:
            done[check.name] = run_check(check, setting, controls)
            if progress is not None:
                progress(done[check.name])
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=spawn, initializer=end_with_parent) as pool:
            first = {"statistical": 0, "solver": 0, "continuous": 1}  # long ones first
            queue = sorted(checks, key=lambda c: first.get(c.kind, 2))
            for future in as_completed([pool.submit(_run_by_name, c.name, setting, controls) for c in queue]):
                outcome = future.result()
                done[outcome.name] = outcome
                if progress is not None:
                    progress(outcome)
    return [done[c.name] for c in checks]
