"""The progress bar: iterations, the live objective and its error."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

__all__ = ["ProgressBar"]


class ProgressBar:
    """A bar on the terminal's error stream; silent where ``show`` is false (by default: where that is no terminal)."""

    def __init__(self, total: int, title: str, show: bool | None) -> None:
        self._bar: Any = None
        self._mean = self._weight = self._variance = 0.0
        if sys.stderr.isatty() if show is None else show:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
                TextColumn("objective {task.fields[objective]}"), TimeElapsedColumn(), TextColumn("left"),
                TimeRemainingColumn(), console=Console(stderr=True),
            )
            self._task = self._bar.add_task(title, total=total, objective="...")

    def __enter__(self) -> ProgressBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int, metrics: dict[str, float]) -> None:
        """Show how far it is; the objective is averaged over about the last ten iterations."""
        if self._bar is None:
            return
        value, error = metrics.get("objective", float("nan")), metrics.get("objective_stderr", float("nan"))
        if value == value:
            self._mean += 0.1 * (value - self._mean)
            self._weight += 0.1 * (1 - self._weight)
            self._variance += 0.1 * ((0.0 if error != error else error**2) - self._variance)
        shown = f"{self._mean / max(self._weight, 1e-12):.4g} ± {(self._variance / 19) ** 0.5:.2g}" if self._weight else "..."
        self._bar.update(self._task, completed=done, total=total, objective=shown)
