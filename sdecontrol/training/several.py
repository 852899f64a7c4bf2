"""What several processes must have in common before they train together, and how they stop together."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from typing import Any

from torch import nn

from .. import ranks
from ..errors import BadFileError, RankError, warn
from ..files.contents import check_fingerprint
from ..methods.base import Method
from ..problems.problem import ControlProblem
from ..randomness import BLOCK

_AGAIN = 5.0  # seconds after which a second interrupt does not wait for the iteration's end


def same_numbers(*modules: nn.Module) -> None:
    """Give all processes the first one's parameters and buffers, as DistributedDataParallel does."""
    if ranks.size() > 1:
        ranks.same_([t for module in modules for t in (*module.parameters(), *module.buffers())], "parameters")


def same_problem(problem: ControlProblem) -> None:
    """Give all processes the first one's modules, and see that their problem is the same.

    Raises:
        RankError: what differs.
    """
    if ranks.size() == 1:
        return
    same_numbers(*problem.modules())
    with ranks.alone():
        own = problem.fingerprint()
    first = ranks.agreed(own, "the problem")
    with ranks.together():
        try:
            check_fingerprint(first, lambda _: own, "the problem of process 0")
        except BadFileError as error:
            raise RankError(
                f"the processes have different problems: {error} Call torch.manual_seed before random numbers are "
                "drawn, and read the same data in each; work for one process goes inside sc.ranks.alone()."
            ) from error
    ranks.agreed(None, "the problem's check")


def check_split(method: Method, batch_size: int) -> None:
    """Whether the processes can split batches of this size; a warning where the method has none to split.

    Raises:
        ValueError: the batch is no multiple of 64 paths a process.
    """
    n = ranks.size()
    if n == 1 or method.default_iterations == 0:
        return
    if not method.splits:
        warn(
            f"{method.name} does not split its training: each of the {n} processes does the whole of it.", stacklevel=4
        )
    elif batch_size % (BLOCK * n):
        raise ValueError(
            f"batch_size must be a multiple of {BLOCK} x {n} processes = {BLOCK * n} (noise is drawn in blocks of "
            f"{BLOCK} paths, whole ones of which go to each process), got {batch_size}."
        )


class Interrupts(contextlib.AbstractContextManager[Any]):
    """Ctrl-C of several processes: all stop after the same iteration. One process is interrupted where it is."""

    def __init__(self) -> None:
        self._asked: float | None = None
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        if ranks.size() > 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, *_: object) -> None:
        if self._asked is not None and time.monotonic() - self._asked > _AGAIN:
            raise KeyboardInterrupt
        self._asked = self._asked or time.monotonic()

    def check(self) -> None:
        """Stop where any process was asked to."""
        if ranks.size() > 1 and ranks.anywhere(self._asked is not None, "interrupts"):
            raise ranks.known_to_all(KeyboardInterrupt())
