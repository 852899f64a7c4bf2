"""The errors of the package. Each is a ValueError, TypeError or RuntimeError, so that ordinary handlers catch them."""

from __future__ import annotations

import difflib
import functools
import pickle
import sys
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


class NonFiniteError(RuntimeError):
    """A NaN or an infinity appeared; the message names what, at which step, and in how many rows.

    Attributes:
        what: the quantity that was not finite ("state", "reward", "gradient", ...).
        step: index of the simulation step, or None where there is none.
        rows: number of batch rows concerned.
        solution: the last good solution, where training was stopped (set by ``solve``). An error that comes from
            another process has it only where it can be pickled.
    """

    def __init__(self, message: str, *, what: str, step: int | None = None, rows: int | None = None) -> None:
        super().__init__(message)
        self.what, self.step, self.rows = what, step, rows
        self.solution: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        # BaseException's own calls the class with args alone: that fails in a parent, which then waits for ever
        facts = dict(vars(self))
        try:
            pickle.dumps(self.solution)
        except Exception:  # of whatever kind: an error must arrive, a solution with functions of the user's need not
            facts["solution"] = None
        return _nonfinite, (type(self), self.args, self.what), facts


def _nonfinite(kind: type[NonFiniteError], arguments: tuple[Any, ...], what: str) -> NonFiniteError:
    """The error again, from what a pickle holds of it."""
    error = kind("", what=what)
    error.args = arguments
    return error


class RewardError(RuntimeError):
    """A reward that is no torch function (:class:`BlackBox`) raised, returned no finite number or not as many as there
    were samples, crashed, or was too slow.

    Attributes:
        cause: in words.
        index, last: of the sample in the batch; where a call of several failed as a whole, of its first and its last.
        name: of the reward among several, or None.
        solution: the last good one, where training was stopped (set by ``solve``).
    """

    def __init__(self, cause: str, index: int = 0, last: int | None = None, name: str | None = None) -> None:
        super().__init__(cause, index, last, name)
        self.cause, self.index, self.last, self.name = cause, index, last, name
        self.note = ""  # of who stops for it
        self.solution: Any = None

    def __str__(self) -> str:
        which = "reward" if self.name is None else f"reward {self.name!r}"
        where = f"sample {self.index}" if self.last is None else f"samples {self.index} to {self.last}"
        return f"{which} failed at {where}: {self.cause}.{self.note}"

    def moved(self, rows: int) -> RewardError:
        """The same, of a part of a batch that begins after so many rows."""
        self.index, self.last = self.index + rows, None if self.last is None else self.last + rows
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.args, {**vars(self), "solution": None}  # it need not be one that can be pickled


class NotDifferentiable(TypeError):
    """A method that needs the reward's gradient met a reward that has none."""


class NoExactSolution(ValueError):
    """No closed form is known for this problem (or for this question about it)."""


class NoLikelihood(TypeError):
    """Likelihood ratios were asked of a solver that has no Gaussian kernels (torchsde's, or the probability flow)."""


class ImproperTarget(ValueError):
    """A log density whose exponential has no finite integral: there is no law to sample."""


class RankError(RuntimeError):
    """Of several processes one has stopped, or they have gone different ways; the message says which, and why."""


class BadFileError(ValueError):
    """A saved file is corrupt, truncated, foreign, or belongs to another problem."""


class MissingFileError(BadFileError, FileNotFoundError):
    """There is no such file."""


_shown = True


def show_warnings(shown: bool) -> None:
    """Whether :func:`warn` is heard: of several processes that do the same work, in one."""
    global _shown
    _shown = shown


def warn(message: str, category: type[Warning] = RuntimeWarning, stacklevel: int = 2) -> None:
    """``warnings.warn`` that is shown each time: Python's own is shown once for each line of code, and the next problem
    with the same fault is another one. The user's filters hold as ever."""
    if not _shown:
        return
    frame = sys._getframe(1)
    for _ in range(stacklevel - 1):
        frame = frame.f_back or frame
    place = frame.f_code.co_filename, frame.f_lineno
    warnings.warn_explicit(message, category, *place, module=frame.f_globals.get("__name__"))


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for an unknown name, with the nearest known ones."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else f"known: {', '.join(names)}."
    return ValueError(f"unknown {kind} {name!r}; {hint}")


def check_name(kind: str, name: object, known: Collection[str]) -> None:
    """Raise :func:`unknown_name` unless the name is known."""
    if name not in known:
        raise unknown_name(kind, name, known)


def renamed(**names: str) -> Callable[[F], F]:
    """A decorator: a call by an argument's former name is a TypeError that gives the present one (former=present)."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for former in names.keys() & kwargs.keys():
                raise TypeError(f"{function.__name__}: {former}= is now called {names[former]}=.")
            return function(*args, **kwargs)

        return cast(F, call)

    return decorate
