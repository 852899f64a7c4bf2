"""What a check has run of the library: the functions behind the names that it says it tests.

A name leads to a function, to a class (any function that is written in it: settings alone run nothing), or to an
attribute of the exact solution (of whichever closed form).
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FrameType
from typing import Any

__all__ = ["Watch", "codes_of"]


def _found(name: str) -> Any:
    """The library's object of a dotted name, as it is written in its class."""
    import sdecontrol as sc

    *path, last = name.split(".")[1:]
    found: Any = sc
    for part in path:
        found = getattr(found, part)
    return inspect.getattr_static(found, last) if inspect.isclass(found) else getattr(found, last)


def _exact(attribute: str) -> Iterator[Any]:
    from sdecontrol.exact.base import ExactControl, ExactSolution

    if attribute == "control":
        yield ExactControl
    known = [ExactSolution]
    while known:
        cls = known.pop()
        known += cls.__subclasses__()
        if attribute in vars(cls):
            yield vars(cls)[attribute]
        elif cls is not ExactSolution:  # where it is an attribute that is set when the solution is made
            yield cls.__init__


def _codes(found: Any) -> Iterator[CodeType]:
    if inspect.isclass(found):
        own = [v for k, v in vars(found).items() if not k.startswith("__") or k in ("__call__", "__getitem__")]
        codes = {code for value in own if not inspect.isclass(value) for code in _codes(value)}
        yield from codes or _codes(found.__init__)
    elif isinstance(found, property):
        yield from (code for part in (found.fget, found.fset) for code in _codes(part))
    elif isinstance(found, functools.cached_property):
        yield from _codes(found.func)
    elif isinstance(found, (staticmethod, classmethod)):
        yield from _codes(found.__func__)
    elif inspect.isfunction(found):
        yield inspect.unwrap(found).__code__


def codes_of(name: str) -> set[CodeType]:
    """The code of a name of the library; one of them must run for the name to be tested."""
    if name.startswith("sdecontrol.exact_solution."):
        return {code for found in _exact(name.rsplit(".", 1)[1]) for code in _codes(found)}
    return set(_codes(_found(name)))


class Watch:
    """Within it, notes which of the named functions begin to run; ``missing`` are the names of which none did."""

    def __init__(self, names: Iterable[str]) -> None:
        self._codes = {name: codes_of(name) for name in names}
        self._wanted = set().union(*self._codes.values())
        self._seen: set[CodeType] = set()
        self._before: Callable[..., Any] | None = None

    @property
    def missing(self) -> list[str]:
        return [name for name, codes in self._codes.items() if not codes & self._seen]

    def __enter__(self) -> Watch:
        self._before = sys.getprofile()
        if self._wanted:
            sys.setprofile(self._note)
        return self

    def __exit__(self, *error: Any) -> None:
        sys.setprofile(self._before)

    def _note(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code in self._wanted:
            self._seen.add(frame.f_code)
            if not self.missing:
                sys.setprofile(self._before)  # all has run: the rest at full speed
