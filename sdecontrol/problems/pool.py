"""A function of one point at a time, called for many: in this process, in worker processes, or by an executor."""

import copy
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from .plain_calls import Outcome
from .workers import Workers

_PER_WORKER = 4  # tasks of a call, so that slow points do not hold up the others


@dataclass(frozen=True)
class _Points:
    """What a worker is asked for: the results at a few points."""

    function: Callable[..., Any]

    def outcome(self, points: Sequence[tuple[Any, ...]]) -> Outcome:
        try:
            return Outcome(_call_many(self.function, points))
        except Exception as error:  # whatever the user's function raises
            return Outcome(None, f"{type(error).__name__}: {error}", error)


class Pool:
    """Calls ``function(*point)`` for each of many points.

    A function goes to each worker process once, when that starts, at the first call; points go in a few tasks for each
    worker. Results come in the order of the points, whatever the workers are, so they do not depend on them.

    Args:
        function: in worker processes, one that pickle can send: defined at the top level of a module.
        workers: None: calls in this process, one after the other. A number: as many processes of the pool's own
            (:class:`Workers <sdecontrol.problems.workers.Workers>`), which end with it. Or an executor
            (``concurrent.futures.ThreadPoolExecutor`` for functions that release the interpreter's lock; loky's,
            dask's), which stays yours to close.
        name: of the function, for errors.

    Raises:
        TypeError, ValueError: workers is none of these; or the function cannot go to worker processes.
    """

    def __init__(self, function: Callable[..., Any], workers: int | Executor | None, name: str) -> None:
        self.function, self.workers, self.name = function, workers, name
        self._processes: Workers | None = None
        if workers is None or isinstance(workers, Executor):
            if isinstance(workers, ProcessPoolExecutor):
                check_sendable(function, name)
            return
        if isinstance(workers, bool) or not isinstance(workers, int):
            raise TypeError(
                "workers must be a number of processes, an executor such as "
                f"concurrent.futures.ThreadPoolExecutor(8), or None; got {type(workers).__name__}."
            )
        if workers < 1:
            raise ValueError(f"workers must be >= 1 processes, or None for none; got {workers}.")
        check_sendable(function, name)

    def __call__(self, points: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The results at these points, in their order.

        Raises:
            RuntimeError: a worker process failed, with the cause.
        """
        if self.workers is None or len(points) == 0:
            return _call_many(self.function, points)
        many = self.workers if isinstance(self.workers, int) else getattr(self.workers, "_max_workers", None) or 8
        size = -(-len(points) // (_PER_WORKER * many))
        parts = [points[low : low + size] for low in range(0, len(points), size)]
        found = self._executed(parts) if isinstance(self.workers, Executor) else self._of_processes(parts)
        return [value for part in found for value in part]

    def _of_processes(self, parts: list[Any]) -> list[list[Any]]:
        assert isinstance(self.workers, int)
        if self._processes is None:
            call: Any = _Points(self.function)
            self._processes = Workers(call, self.workers, "process", None)
        found = []
        for outcome in self._processes.run([(part,) for part in parts]):
            if outcome.values is None:
                raise RuntimeError(f"{self.name} failed in a worker process: {outcome.cause}.")
            found.append(outcome.values)
        return found

    def _executed(self, parts: list[Any]) -> list[list[Any]]:
        assert isinstance(self.workers, Executor)
        try:
            return list(self.workers.map(_call_many, [self.function] * len(parts), parts))
        except BrokenExecutor as error:
            raise RuntimeError(
                f"{self.name}: a worker of your executor died (out of memory, or a crash in compiled code). Run it "
                "with workers=None to see its own error."
            ) from error

    def __deepcopy__(self, memo: Any) -> "Pool":
        return Pool(copy.deepcopy(self.function, memo), self.workers, self.name)  # with processes of its own

    def __getstate__(self) -> dict[str, Any]:  # as does one in another process
        return {**self.__dict__, "_processes": None}


def check_sendable(function: Callable[..., Any], name: str) -> None:
    """Raise where pickle cannot send a function to another process.

    Raises:
        ValueError: naming it, and what can.
    """
    try:
        pickle.dumps(function)
    except Exception as error:  # pickle raises whatever an object's own methods do
        raise ValueError(
            f"{name} cannot go to worker processes ({error}): define it with def at the top level of a module (no "
            "lambda, nothing inside another function), bind data with functools.partial, or pass "
            "workers=concurrent.futures.ThreadPoolExecutor(n) where it releases the interpreter's lock."
        ) from error


def _call_many(function: Callable[..., Any], points: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [function(*point) for point in points]
