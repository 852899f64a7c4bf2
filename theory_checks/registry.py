"""What a check is: one statement, a function that measures it, and the broken variants on which it must fail.

A check is a short function ``(setting, defect) -> measurements`` whose docstring is the statement. With an empty
``defect`` it must pass. With each of its declared controls as ``defect`` it runs the same code on a deliberately broken
input and must fail; a check without a control is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .executed import Watch

__all__ = [
    "FAMILY_WISE_ERROR",
    "Check",
    "Measurement",
    "Setting",
    "all_checks",
    "check",
    "compare",
    "order",
    "p_value",
    "select",
    "within",
]

FAMILY_WISE_ERROR = 1e-6  #: probability that any statistical test of the suite fails although all statements hold
CHECKS: dict[str, Check] = {}
_ORDER = {
    name: i
    for i, name in enumerate(
        (
            "models",
            "chain",
            "finite",
            "mixtures",
            "continuous",
            "grids",
            "kernels",
            "stopping",
            "paths",
            "estimators",
            "sampling",
            "particles",
            "gradients",
            "schemes",
            "guidance",
            "evaluation",
            "answers",
            "doors",
            "solvers",
            "errata",
        )
    )
}


@dataclass(frozen=True)
class Measurement:
    """One comparison: ``what`` was compared, its ``value`` (an error, or a p-value) and the tolerance for it.

    kind "error": passes if value <= tolerance. kind "p": passes if value >= tolerance, which is the test's share of the
    family-wise error.
    """

    what: str
    value: float
    tolerance: float
    kind: str = "error"

    @property
    def passed(self) -> bool:
        return bool(self.value >= self.tolerance if self.kind == "p" else self.value <= self.tolerance)  # nan fails

    @property
    def severity(self) -> float:
        """How far beyond the tolerance (> 1 fails), to find the worst of several."""
        if not np.isfinite(self.value):
            return np.inf
        if self.kind == "p":
            return float(np.log(max(self.value, 1e-300)) / np.log(self.tolerance))
        if self.tolerance == 0:
            return 0.0 if self.value <= 0 else np.inf
        return self.value / self.tolerance


@dataclass(frozen=True)
class Setting:
    """How a check runs: the seed of its random problems, and whether to take more and larger ones."""

    seed: int = 0
    thorough: bool = False

    def rng(self, place: int = 0) -> np.random.Generator:
        return np.random.default_rng((self.seed, place))

    def count(self, usual: int, thorough: int) -> int:
        return thorough if self.thorough else usual


CheckFunction = Callable[[Setting, str], Iterator[Measurement]]


@dataclass(frozen=True)
class Check:
    """One registered check.

    Attributes:
        name: on the command line (``--only``); begins with the statement, e.g. "theorem-1-chain".
        statement: the tutorial's number (or docs/mathematics.md's section), e.g. "Theorem 1".
        kind: "exact", "continuous", "statistical", "estimator", "solver" or "errata".
        implements: dotted names of the library's functions that are tested: it must have run each of them.
        about: those whose equations are tested, by the check's own lines.
        controls: the defects on which it must fail.
        tests: how many p-values it gives (its part of the family of statistical tests).
    """

    name: str
    statement: str
    kind: str
    implements: tuple[str, ...]
    controls: tuple[str, ...]
    tests: int
    function: CheckFunction
    about: tuple[str, ...] = ()

    @property
    def doc(self) -> str:
        return " ".join((self.function.__doc__ or "").split())

    def measure(self, setting: Setting, defect: str = "") -> list[Measurement]:
        """Run once; with a defect until the first comparison fails, as it must. p-values get their share of the
        family-wise error over all registered tests.

        Raises:
            RuntimeError: without a defect, where it ran none of the code of a name that it says it tests.
        """
        share = FAMILY_WISE_ERROR / max(1, sum(c.tests for c in CHECKS.values()))
        found: list[Measurement] = []
        with Watch(() if defect else self.implements) as watch:
            for m in self.function(setting, defect):
                found.append(Measurement(m.what, m.value, share, "p") if m.kind == "p" else m)
                if defect and not found[-1].passed:
                    break
        if watch.missing:
            raise RuntimeError(
                f"check {self.name!r} says that it tests {', '.join(watch.missing)}, and did not run it."
            )
        count = sum(m.kind == "p" for m in found)
        if not defect and count != self.tests:
            raise RuntimeError(f"check {self.name!r} declares {self.tests} statistical tests but made {count}.")
        if not found:
            raise RuntimeError(f"check {self.name!r} measured nothing.")
        return found


def check(
    name: str,
    statement: str,
    *,
    kind: str = "exact",
    implements: Sequence[str] = (),
    about: Sequence[str] = (),
    controls: Sequence[str],
    tests: int = 0,
) -> Callable[[CheckFunction], CheckFunction]:
    """Register a check.

    Raises:
        ValueError: no negative control, no statement in the docstring, or a name that is taken.
    """

    def register(function: CheckFunction) -> CheckFunction:
        if not controls or "" in controls:
            raise ValueError(f"check {name!r} has no negative control: name at least one defect on which it must fail.")
        if not (function.__doc__ or "").strip():
            raise ValueError(f"check {name!r} has no docstring; it is the statement that is checked.")
        if name in CHECKS:
            raise ValueError(f"there are two checks named {name!r}.")
        CHECKS[name] = Check(name, statement, kind, tuple(implements), tuple(controls), tests, function, tuple(about))
        return function

    return register


def all_checks() -> list[Check]:
    """All checks: models, the theory on chains, on finite spaces, of mixtures, in continuous time, with stopping,
    paths, estimators, samples, solvers, errata."""
    from . import statements  # noqa: F401  (importing registers them)

    return sorted(CHECKS.values(), key=lambda c: _ORDER.get(c.function.__module__.rsplit(".", 1)[-1], len(_ORDER)))


def select(only: Sequence[str] = ()) -> list[Check]:
    """The checks whose name contains one of the words, or all.

    Raises:
        ValueError: a word that fits no check.
    """
    checks = all_checks()
    for word in only:
        if not any(word in c.name for c in checks):
            raise ValueError(f"no check is named like {word!r}; known: {', '.join(c.name for c in checks)}.")
    return [c for c in checks if not only or any(word in c.name for word in only)]


def as_array(value: Any) -> np.ndarray:
    """Numbers of either side as a float64 array."""
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value, dtype=np.float64)


def compare(what: str, got: Any, want: Any, tolerance: float = 1e-9) -> Measurement:
    """Largest difference, relative to the largest number that was expected where that exceeds 1."""
    a, b = as_array(got), as_array(want)
    if a.shape != b.shape:
        raise ValueError(f"{what}: shapes {a.shape} and {b.shape} cannot be compared.")
    return Measurement(what, float(np.max(np.abs(a - b)) / max(1.0, float(np.max(np.abs(b))))), tolerance)


def within(what: str, value: float, tolerance: float) -> Measurement:
    """A number that must not exceed its tolerance."""
    return Measurement(what, float(value), tolerance)


def p_value(what: str, p: float) -> Measurement:
    """A statistical test; its threshold is set when all tests are counted."""
    return Measurement(what, float(p), np.nan, "p")


def order(what: str, sizes: Any, errors: Any, want: float = 1.0, tolerance: float = 0.1) -> Measurement:
    """Distance of the measured order of convergence (log-log slope over the finest half) from the one that is
    claimed."""
    x, y = np.log(as_array(sizes)), np.log(np.maximum(as_array(errors), 1e-300))
    slope = np.polyfit(x[-3:], y[-3:], 1)[0]
    return Measurement(f"{what}: order {slope:.3f}, claimed {want:g}", float(abs(slope - want)), tolerance)
