"""The progress bar: iterations, the live objective and its error."""

from __future__ import annotations

import sys
import time
from typing import Any

from ..evaluation.estimates import Estimate

PLAIN_EVERY = 5.0  # seconds between two lines where the error stream is no terminal


class ProgressBar:
    """A bar on the terminal's error stream; silent where ``show`` is false (by default: where that is no terminal).

    Where ``show`` is true and the error stream is no terminal (a log file), a plain line every five seconds.

    Args:
        total: iterations; None: not known, since a budget of time ends them.
        measure: the metric shown, with ``{measure}_stderr`` as its error if there is one.
        latest: show its last value alone, for iterations that are estimates in themselves; else averaged over about
            ten.
    """

    def __init__(
        self, total: int | None, title: str, show: bool | None, measure: str = "objective", latest: bool = False
    ) -> None:
        self._bar: Any = None
        self._new = 1.0 if latest else 0.1
        self._measure, self._title = measure, title
        self._mean = self._weight = self._variance = 0.0
        terminal = sys.stderr.isatty()
        self._plain = bool(show) and not terminal
        self._began = self._last = time.monotonic()
        if terminal and show is not False:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn(measure + " {task.fields[shown]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(title, total=total, shown="...")

    def __enter__(self) -> ProgressBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, line: str) -> None:
        """One line above the bar, where progress is shown."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        elif self._plain:
            print(line, file=sys.stderr, flush=True)

    def update(self, done: int, total: int | None, metrics: dict[str, float]) -> None:
        """Show how far it is, and the measure."""
        if self._bar is None and not self._plain:
            return
        value, error = metrics.get(self._measure, float("nan")), metrics.get(f"{self._measure}_stderr", float("nan"))
        if value == value:
            self._mean += self._new * (value - self._mean)
            self._weight += self._new * (1 - self._weight)
            self._variance += self._new * ((0.0 if error != error else error**2) - self._variance)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, shown=self._shown())
        elif done == total or time.monotonic() - self._last >= PLAIN_EVERY:
            self._last = time.monotonic()
            of = "" if total is None else f"/{total}"
            print(
                f"{self._title} {done}{of}, {self._measure} {self._shown()}, {self._last - self._began:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    def _shown(self) -> str:
        if not self._weight:
            return "..."
        value = self._mean / max(self._weight, 1e-12)
        # the variance of a mean with weights w_i ~ (1 - new)^i is new/(2 - new) of one iteration's
        error = (self._variance * self._new / (2 - self._new)) ** 0.5
        return str(Estimate(value, error)) if error > 0 else f"{value:.4g}"
