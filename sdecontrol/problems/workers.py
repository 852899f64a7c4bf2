"""Threads and processes that call a function, with a limit of time for each call.

A worker process is started by "spawn" and holds one end of a pipe of its own: it ends with its parent, however that
ends, and one that is too slow is ended and replaced. (The pools of the standard library can do neither: their queues
stay open as long as a worker lives, and they know no limit of time that ends a call.) No torch is imported here.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from typing import Any

from .plain_calls import Outcome, PlainCall

POOLS = ("thread", "process")
_START_SECONDS = 300.0  # in which a process must have imported what it needs

Task = tuple[Any, ...]


def end_with_parent() -> None:
    """From here on this process ends with the one that started it, however that ends, in the midst of a call too."""
    parent: Any = multiprocessing.parent_process()

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _serve(pipe: Connection) -> None:
    """A worker process: a call for each task that comes, until there is nobody left to ask."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it, too, and closes the pipe
    end_with_parent()
    with contextlib.suppress(EOFError, OSError):
        try:
            call: PlainCall = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        except BaseException as error:  # whatever the modules raise that it comes from
            pipe.send_bytes(pickle.dumps(f"{type(error).__name__}: {error}"))
            return
        pipe.send_bytes(pickle.dumps(""))
        while True:
            found = call.outcome(*pickle.loads(pipe.recv_bytes()))
            pipe.send_bytes(pickle.dumps(found._replace(error=None)))  # not every exception can be sent


class _Process:
    """One worker process, started when it is first needed; and again after it was ended."""

    def __init__(self, payload: bytes, timeout: float | None) -> None:
        self.payload, self.timeout = payload, timeout
        self.process: Any = None
        self.pipe: Any = None

    def start(self) -> str:
        """Why it could not be; empty where it was."""
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        try:
            self.process.start()
            theirs.close()
            self.pipe.send_bytes(self.payload)
            why = pickle.loads(self.pipe.recv_bytes()) if self.pipe.poll(_START_SECONDS) else "it did not begin in time"
        except (EOFError, OSError, RuntimeError):
            why = (
                "it ended before it began (a script must have `if __name__ == '__main__':` around what it runs, since "
                "every process imports it)"
            )
        if why:
            self.end()
        return why

    def __call__(self, task: Task) -> Outcome:
        if self.process is None and (why := self.start()):
            return Outcome(None, f"a worker process could not be started: {why}")
        pipe, process = self.pipe, self.process
        assert process is not None
        try:
            pipe.send_bytes(pickle.dumps(task))
            if pipe.poll(self.timeout):
                return Outcome(*pickle.loads(pipe.recv_bytes()))
            cause = f"it took longer than timeout={self.timeout:g} seconds, and was ended"
        except (EOFError, OSError):
            process.join(1.0)
            cause = f"its process ended in the midst of it, with exit code {process.exitcode}"
        self.end()
        return Outcome(None, cause)

    def end(self) -> None:
        process, self.process = self.process, None
        if process is not None and process.pid is not None:
            process.kill()
            process.join()
            self.pipe.close()


class _Thread:
    """The calling thread; one of its own for each call where there is a limit of time."""

    def __init__(self, call: PlainCall, timeout: float | None) -> None:
        self.call, self.timeout = call, timeout

    def __call__(self, task: Task) -> Outcome:
        if self.timeout is None:
            return self.call.outcome(*task)
        found: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        threading.Thread(target=lambda: found.put(self.call.outcome(*task)), daemon=True).start()
        try:
            return found.get(timeout=self.timeout)
        except queue.Empty:
            return Outcome(None, f"it took longer than timeout={self.timeout:g} seconds")

    def end(self) -> None:
        """Nothing is left of it but a call that was too slow, which no one can end."""


def _end(workers: Sequence[_Process | _Thread]) -> None:
    for worker in workers:
        worker.end()


class Workers:
    """So many calls at a time, in threads or processes.

    Args:
        call: what is called. count: of the workers. kind: one of :data:`POOLS`. timeout: seconds of one call, or None.

    Raises:
        ValueError: processes, and the function cannot be sent to one.
    """

    def __init__(self, call: PlainCall, count: int, kind: str, timeout: float | None) -> None:
        make: Callable[[], _Process | _Thread] = lambda: _Thread(call, timeout)  # noqa: E731
        self.direct = kind == "thread" and count == 1
        if kind == "process":
            try:
                payload = pickle.dumps(call)
            except Exception as error:  # of whatever kind
                raise ValueError(
                    f"pool='process': the function cannot be sent to another process ({error}). Define it (not a "
                    "lambda, nor inside another function) at the top level of a module, or use pool='thread'."
                ) from error
            make = lambda: _Process(payload, timeout)  # noqa: E731
        self.workers = [make() for _ in range(count)]
        self.close = weakref.finalize(self, _end, self.workers)  # when it is no longer used, or at the end of Python

    def run(self, tasks: Sequence[Task]) -> Generator[Outcome, None, None]:
        """What the calls have come to, in the order of the tasks. Closed before its end, it begins no more."""
        if self.direct:
            yield from map(self.workers[0], tasks)
            return
        free: queue.SimpleQueue[_Process | _Thread] = queue.SimpleQueue()
        for worker in self.workers:
            free.put(worker)

        def one(task: Task) -> Outcome:
            worker = free.get()
            try:
                return worker(task)
            finally:
                free.put(worker)

        executor = ThreadPoolExecutor(len(self.workers))
        try:
            for future in [executor.submit(one, task) for task in tasks]:
                yield future.result()
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            _end(self.workers)  # what they are at would keep them, and whoever waits for them
            raise
        executor.shutdown()
