"""A function of one point at a time, called for many: in this process, or in the workers of a pool."""

import contextlib
import copy
import multiprocessing
import pickle
import signal
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from typing import Any

_PER_WORKER = 4  # tasks of a call, so that slow points do not hold up the others
_installed: dict[int, Callable[..., Any]] = {}  # in a worker process: what it calls


class Pool:
    """Calls ``function(*point)`` for each of many points.

    A function goes to each worker process once, when the pool starts, at the first call; points go in a few tasks for
    each worker. Results come in the order of the points, whatever the workers are, so they do not depend on them.

    Args:
        function: in worker processes, one that pickle can send: defined at the top level of a module.
        workers: None: calls in this process, one after the other. A number: as many processes of the pool's own. Or
            an executor (``concurrent.futures.ThreadPoolExecutor`` for functions that release the interpreter's lock;
            loky's, dask's), which stays yours to close.
        name: of the function, for errors.

    Raises:
        TypeError, ValueError: workers is none of these; or the function cannot go to worker processes.
    """

    def __init__(self, function: Callable[..., Any], workers: int | Executor | None, name: str) -> None:
        self.function, self.workers, self.name = function, workers, name
        self._executor: Executor | None = None
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
            RuntimeError: a worker died.
        """
        if self.workers is None or len(points) == 0:
            return [self.function(*point) for point in points]
        own = not isinstance(self.workers, Executor)
        executor = self._started() if own else self.workers
        assert isinstance(executor, Executor)
        many = self.workers if isinstance(self.workers, int) else getattr(executor, "_max_workers", None) or 8
        size = -(-len(points) // (_PER_WORKER * many))
        parts = [points[low : low + size] for low in range(0, len(points), size)]
        try:
            if own:
                found = list(executor.map(_call_installed, [id(self)] * len(parts), parts))
            else:
                found = list(executor.map(_call_many, [self.function] * len(parts), parts))
        except BrokenExecutor as error:
            self.close()
            raise RuntimeError(
                f"{self.name}: a worker process died (out of memory, a crash in compiled code, or a script without "
                "`if __name__ == '__main__':` around what it runs, which every new process reads again). Run it with "
                "workers=None to see its own error."
            ) from error
        return [value for part in found for value in part]

    def _started(self) -> Executor:
        if self._executor is None:
            assert isinstance(self.workers, int)
            # forked copies of a process with torch's threads may hang
            methods = multiprocessing.get_all_start_methods()
            context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
            self._executor = ProcessPoolExecutor(self.workers, context, _install, (id(self), self.function))
            weakref.finalize(self, self._executor.shutdown, wait=False, cancel_futures=True)
        return self._executor

    def close(self) -> None:
        """End the pool's own processes; a later call starts new ones."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None

    def __deepcopy__(self, memo: Any) -> "Pool":
        return Pool(copy.deepcopy(self.function, memo), self.workers, self.name)  # with processes of its own


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


def _install(key: int, function: Callable[..., Any]) -> None:
    with contextlib.suppress(ValueError):  # Ctrl-C is for the process that waits
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    _installed[key] = function


def _call_installed(key: int, points: Sequence[tuple[Any, ...]]) -> list[Any]:
    return _call_many(_installed[key], points)


def _call_many(function: Callable[..., Any], points: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [function(*point) for point in points]
