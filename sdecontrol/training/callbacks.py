"""Callbacks: any object with some of the methods below. One that raises gives a warning; training goes on
unperturbed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import warn
from ..evaluation.solution import Solution


@dataclass
class TrainingState:
    """What callbacks get.

    Attributes:
        iteration, iterations: how many are done, and at most to do.
        metrics: of the last iteration.
        history: of all iterations.
        solution: ``solution()`` gives the current solution (averaged weights, a copy).
        settings: of the run, plain: method, seed, batch size and what else its numbers depend on.
        evaluation, path, exception: with on_evaluate, on_save, on_exception.
    """

    iteration: int
    iterations: int
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    solution: Callable[[], Solution] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    evaluation: Any = None
    path: Any = None
    exception: BaseException | None = None


class Callback:
    """Base with methods that do nothing; any object with some of them will do."""

    def on_train_begin(self, state: TrainingState) -> None: ...
    def on_step_end(self, state: TrainingState) -> None: ...
    def on_evaluate(self, state: TrainingState) -> None: ...
    def on_save(self, state: TrainingState) -> None: ...
    def on_exception(self, state: TrainingState) -> None: ...
    def on_train_end(self, state: TrainingState) -> None: ...


def notify(callbacks: Sequence[Any], event: str, state: TrainingState) -> None:
    """Call one event of all callbacks."""
    for callback in callbacks:
        function = getattr(callback, event, None)
        if function is None:
            continue
        try:
            function(state)
        except Exception as error:
            warn(
                f"{type(callback).__name__}.{event} raised {type(error).__name__}: {error}; training goes on.",
                RuntimeWarning,
                stacklevel=2,
            )
