"""What a step computes once and is asked for twice, with a lifetime: the ``with`` block in which a path takes its
steps.

A chain's kernel and a tuned control want the same prediction of a model at the same state; backward and forward kernels
the same score. Inside ``with remembering():`` the last value of each is at hand; at its end all are dropped, with the
graphs they would keep alive. Outside nothing is kept, but inside ``with stored(...):``, where states that were stored
bring what was computed at them.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor


class _Stored(NamedTuple):
    """What an owner computed at states ``(K, batch, *event)``, by keys one for each of the K; ``values`` ``(K, batch,
    ...)``."""

    owner: Any
    keys: Sequence[Any]
    states: Tensor
    version: int
    values: Tensor

    def at(self, key: Any, x: Tensor) -> Tensor | None:
        """The values at x, where that is a part of the stored states of this key: the same numbers in memory."""
        states = self.states
        if x.shape[1:] != states.shape[2:] or x.stride()[1:] != states.stride()[2:] or x.dtype != states.dtype:
            return None
        if (len(x) > 1 and x.stride(0) != states.stride(1)) or states._version != self.version:
            return None
        if x.untyped_storage().data_ptr() != states.untyped_storage().data_ptr():
            return None
        past = int(x.storage_offset()) - int(states.storage_offset())
        if past < 0 or not states.stride(0) or not states.stride(1):
            return None
        step, rest = divmod(past, states.stride(0))
        row, odd = divmod(rest, states.stride(1))
        if odd or step >= len(self.keys) or self.keys[step] != key or row + len(x) > states.shape[1]:
            return None
        return self.values[step, row : row + len(x)]


class _Known(threading.local):
    def __init__(self) -> None:
        self.depth = 0
        self.stored: list[_Stored] = []
        self.last: dict[int, tuple[Any, Any, Tensor, Tensor]] = {}


_known = _Known()


@contextlib.contextmanager
def remembering() -> Iterator[None]:
    """Within it, :func:`recall` remembers; blocks may stand in one another, and the outermost one ends it."""
    _known.depth += 1
    try:
        yield
    finally:
        _known.depth -= 1
        if not _known.depth:
            _known.last.clear()


@contextlib.contextmanager
def stored(owner: Any, keys: Sequence[Any], states: Tensor, values: Tensor) -> Iterator[None]:
    """Within it, :func:`recall` of this owner at any part of ``states`` ``(K, batch, *event)``, which lie where they
    lie, gives that of ``values`` ``(K, batch, ...)``.

    Args:
        keys: under which they were computed, one for each of the K.
    """
    _known.stored.append(_Stored(owner, keys, states, states._version, values))
    try:
        yield
    finally:
        _known.stored.pop()


def recall(owner: Any, key: Any, x: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """``make()``, or its last value for this owner, if that was for the same key and this very x; or what is stored
    with x."""
    found = _known.last.get(id(owner))
    if found is not None and found[0] is owner and found[1] == key and found[2] is x:
        return found[3]
    for entry in reversed(_known.stored):
        if entry.owner is owner and (held := entry.at(key, x)) is not None:
            return held
    value = make()
    if _known.depth:
        _known.last[id(owner)] = (owner, key, x, value)
    return value


def hand_on(owner: Any, leaf: Tensor, x: Tensor) -> None:
    """Let what the owner computed at ``leaf``, a copy of x at which a gradient was taken, be its last value at x,
    without its graph."""
    found = _known.last.get(id(owner))
    if found is not None and found[0] is owner and found[2] is leaf:
        _known.last[id(owner)] = (owner, found[1], x, found[3].detach())


class Remembered:
    """A function of hashable arguments with its last ``most`` values at hand; copies and pickles hold none of them."""

    def __init__(self, function: Callable[..., Any], most: int) -> None:
        self.function, self.most = function, most
        self._values = lru_cache(most)(function)

    def __call__(self, *arguments: Any) -> Any:
        return self._values(*arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return Remembered, (self.function, self.most)


def once_a_step(shift: Callable[[int, Tensor, Any], Tensor]) -> Callable[[int, Tensor, Any], Tensor]:
    """A shift function that remembers its last value: a reverse law asks for what the next step needs."""
    return lambda k, x, y: recall(shift, k, x, lambda: shift(k, x, y))
