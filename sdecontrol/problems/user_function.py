"""A user's function of a density's parameters, in the form in which people have it: in torch or numpy, of many points
at once or of one, of a vector or a dictionary, here or in a pool."""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import check_name, warn
from ..tensors import ask, probing
from .pool import Pool

ARRAYS = ("torch", "numpy")
#: what a function raises of its arguments, rather than of itself
REFUSED = (ValueError, ArithmeticError, torch.linalg.LinAlgError)
_FEW = 2  # points with which a function of one point is tried
_CLOSE = 1e-3
_STEADY = 1e3  # times the spacing of numbers: what two calls at the same points may differ by


class UserFunction:
    """``function(values)`` or ``function(values, y)`` as one that takes and gives tensors of many rows.

    Args:
        name: for errors. arrays: "torch" or "numpy"; None: found by :meth:`settle`.
        vectorised: it takes all rows at once, and gives one number for each; else it takes one point.
        workers: of a function of one point: see :class:`Pool`.

    Attributes:
        graph: whether its results have had a graph (settled by :meth:`settle`).
        asked: rows of its calls by :meth:`settle`.
        noise: standard deviation of its results at the same points; 0 where they are the same.
        settled: whether it has been tried. refused: rows at which it has raised since.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        *,
        arrays: str | None = None,
        vectorised: bool = True,
        workers: int | Executor | None = None,
    ) -> None:
        if not callable(function):
            raise TypeError(f"{name} must be a function x -> (batch,), got {type(function).__name__}.")
        if arrays is not None:
            check_name("arrays", arrays, ARRAYS)
        if not isinstance(vectorised, bool):
            raise TypeError(f"vectorised must be True or False, got {vectorised!r}.")
        if workers is not None and vectorised:
            raise ValueError(
                "workers goes with vectorised=False: it spreads calls of one point over workers, and this function "
                "takes all points at once."
            )
        self.function, self.name, self.arrays, self.vectorised = function, name, arrays, vectorised
        self.pool = Pool(function, workers, name)
        if workers is not None and arrays is None:
            self.arrays = "numpy"  # graphs do not cross processes
        self.graph, self.asked, self.noise = False, 0, 0.0
        self.settled, self.refused = False, 0

    @property
    def modules(self) -> list[nn.Module]:
        return [self.function] if isinstance(self.function, nn.Module) else []

    def __call__(self, values: Any, y: Any = None) -> Any:
        """At rows of ``values`` (a tensor ``(n, size)``, or a dictionary of tensors): ``(n,)`` with the graph of a
        torch function, or whatever else the function has given, for :meth:`settle` to judge.

        Where it raises at some rows and not at all of them (a law that refuses an infinite scale, a solver that breaks
        down), the density counts as 0 there; of a function of one point, where it raises.

        Raises:
            What it raises at all of them.
        """
        try:
            return self._called(values, y)
        except REFUSED as error:
            if not self.settled:
                raise
            found = self._apart(values, y, error)
            if found is None:
                raise
            return found

    def _apart(self, values: Any, y: Any, error: Exception) -> Tensor | None:
        """Its results where it gives any, by halves, and -inf elsewhere; None where it gives none."""
        rows = len(_first(values))
        parts, bad = self._halved(values, y, slice(0, rows)), 0
        good = [p for p in parts if isinstance(p, Tensor)]
        if not good:
            return None
        found = []
        for part in parts:
            if isinstance(part, int):
                bad += part
                found.append(good[0].new_full((part,), -math.inf))
            else:
                found.append(part)
        self._say_refused(error, bad, rows)
        return torch.cat(found)

    def _say_refused(self, error: Exception, bad: int, rows: int) -> None:
        if not self.refused:
            warn(
                f"{self.name} raised {type(error).__name__} at {bad} of {rows} points: {str(error)[:200]} The density "
                "counts as 0 at such points. Return -inf there to say so yourself; where that is a mistake, correct "
                "it.",
                UserWarning,
                stacklevel=5,
            )
        self.refused += bad

    def _each(self, points: list[tuple[Any, ...]]) -> list[Any]:
        """Results at points, each of them asked for once."""
        if self.pool.workers is not None or not self.settled:
            return self.pool(points)
        found: list[Any] = []
        last, bad = None, 0
        for point in points:
            try:
                found.append(self.function(*point))
            except REFUSED as error:
                found.append(-math.inf)
                last, bad = error, bad + 1
        if last is not None:
            self._say_refused(last, bad, len(points))
        return found

    def _halved(self, values: Any, y: Any, rows: slice) -> list[Tensor | int]:
        """Results of parts of the rows, in order; of those at which it raises their number."""
        n = rows.stop - rows.start
        if n == 1:
            return [1]
        found: list[Tensor | int] = []
        middle = rows.start + n // 2
        for part in (slice(rows.start, middle), slice(middle, rows.stop)):
            try:
                found.append(self._called(_rows(values, part), None if y is None else y[part]))
            except REFUSED:
                found += self._halved(values, y, part)
        return found

    def _called(self, values: Any, y: Any) -> Any:
        if self.arrays == "numpy":
            return self._of_numpy(values, y)
        if self.vectorised:
            rest = () if y is None else (y,)
            if isinstance(values, Mapping):
                return self.function(values, *rest)
            return ask(self.name, self.function, values, *rest)
        found = self._each(_points(values, y))
        return torch.stack([self._number(v, _first(values)) for v in found]) if found else _first(values).new_zeros(0)

    def _of_numpy(self, values: Any, y: Any) -> Tensor:
        """By numpy arrays of double precision, which are copies."""
        like = _first(values)
        rows, y = len(like), None if y is None else _array(y)
        given = {k: _array(v) for k, v in values.items()} if isinstance(values, Mapping) else _array(values)
        if self.vectorised:
            with np.errstate(all="ignore"):  # far out, where nothing is to be expected of a density
                found = np.asarray(self.function(given, *(() if y is None else (y,))))
            if found.shape != (rows,):
                raise ValueError(f"{self.name} must return shape ({rows},), got {found.shape}. {_hint(found)}")
        else:
            with np.errstate(all="ignore"):
                each = [self._float(v) for v in self._each(_points(given, y))]
            found = np.array(each, dtype=np.float64)
        if not np.issubdtype(found.dtype, np.number) or np.iscomplexobj(found):
            raise TypeError(f"{self.name} must return numbers, got an array of {found.dtype}.")
        return torch.from_numpy(found.astype(np.float64)).to(like.device)

    def _float(self, value: Any) -> float:
        """One point's value."""
        array = value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)
        if array.size != 1 or not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
            what = f"shape {array.shape}" if array.dtype != object else type(value).__name__
            raise ValueError(
                f"{self.name} must return one number for one point, got {what}. With vectorised=False it is called "
                "with one point at a time; where it takes many, leave vectorised out."
            )
        return float(array.reshape(()))

    def _number(self, value: Any, like: Tensor) -> Tensor:
        if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point():
            return value.reshape(())
        return torch.tensor(self._float(value), dtype=torch.float64, device=like.device)

    # ---------------------------------------------------------------- found out by a few calls

    def settle(self, values: Any, y: Any, called: str, alone: str) -> Any:
        """Call it on a few rows, and find out whether it takes torch's tensors or numpy's arrays, where that was not
        said; what it gave.

        It is tried with tensors that want a gradient; then with numpy's arrays; then with plain tensors.

        Args:
            values: as of :meth:`__call__`; their tensors want a gradient.
            called: how it is called, for errors. alone: its arguments beside a condition.

        Raises:
            TypeError, ValueError, RuntimeError: its own, with its name.
        """
        if not self.vectorised:
            values = _rows(values, slice(_FEW))
            y = None if y is None else y[:_FEW]
        plain = {k: v.detach() for k, v in values.items()} if isinstance(values, Mapping) else values.detach()
        if self.arrays == "numpy":
            return self._again(self._tried(plain, y, called, alone), plain, y)
        found, failed = None, None
        try:
            found = self._tried(values, y, called, alone)
        except Exception as error:
            if self.arrays == "torch" and not _wants_no_graph(error):
                raise
            failed = error
        smooth = isinstance(found, Tensor) and (self.vectorised or found.requires_grad)
        other = self._by_numpy(plain, y) if self.arrays is None and not self.modules else None
        if isinstance(other, Tensor) and not smooth:
            self.arrays = "numpy"
            return self._again(other, plain, y)
        if failed is not None:
            if not _wants_no_graph(failed):
                raise failed
            found = self._tried(plain, y, called, alone)  # a black box that leaves torch
        if not isinstance(found, Tensor):
            if isinstance(found, np.ndarray) and isinstance(other, Exception):
                raise other
            raise TypeError(
                f"{self.name} must return a torch tensor (or, of numpy's arrays, an array), one number for each row; "
                f"got {type(found).__name__}. Return torch.as_tensor(v, dtype=x.dtype) of shape (batch,); a function "
                "of one point goes with vectorised=False."
            )
        self.graph, self.arrays = found.requires_grad, "torch"
        apart = isinstance(other, Tensor) and found.shape == other.shape
        if apart and isinstance(other, Tensor) and self._alike(found.detach().double(), other):
            return found  # which says that there is no noise, too
        self._again(found, plain, y)
        if apart and not self.noise:
            raise ValueError(
                f"{self.name} takes torch's tensors and numpy's arrays, and gives other numbers for each (std, var and "
                "the like differ between the two): say which it is written for by arrays='torch' or arrays='numpy'."
            )
        return found

    def _again(self, found: Tensor, values: Any, y: Any) -> Tensor:
        """What it gave, and whether it gives the same once more."""
        rows = len(_first(values))
        if found.shape != (rows,) or not (found.is_floating_point() or self.arrays == "numpy"):
            return found  # of which is said what is wrong
        self.asked += rows
        with torch.no_grad():
            first = found.detach().double()
            second = torch.as_tensor(self(values, y)).double().to(first.device)
        close = _STEADY * torch.finfo(found.dtype if found.is_floating_point() else torch.float64).eps
        apart = torch.where(first == second, 0.0, second - first)
        known = apart.isfinite()
        if bool((apart.abs() > close * (1 + first.abs()))[known].any()):
            self.noise = float((0.5 * apart[known].square().mean()).sqrt())
        return found

    def _tried(self, values: Any, y: Any, called: str, alone: str) -> Any:
        self.asked += len(_first(values))
        parts = list(values.values()) if isinstance(values, Mapping) else [values]
        with probing(self.name, called, alone, (*parts, y)):
            return self(values, y)

    def _by_numpy(self, values: Any, y: Any) -> Any:
        """Its results, or why there are none."""
        before, self.arrays = self.arrays, "numpy"
        self.asked += len(_first(values))
        try:
            return self._of_numpy(values, y)
        except Exception as error:  # of a function written for torch, anything
            return error
        finally:
            self.arrays = before

    @staticmethod
    def _alike(found: Tensor, other: Tensor) -> bool:
        """Whether both kinds of arrays give the same: ``x.std()`` is another number in each."""
        return torch.allclose(found.nan_to_num(), other.nan_to_num(), rtol=_CLOSE, atol=_CLOSE)


def _wants_no_graph(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and ("requires grad" in str(error) or "detach()" in str(error))


def _first(values: Any) -> Tensor:
    return next(iter(values.values())) if isinstance(values, Mapping) else values


def _rows(values: Any, rows: slice) -> Any:
    return {k: v[rows] for k, v in values.items()} if isinstance(values, Mapping) else values[rows]


def _array(value: Any) -> np.ndarray:
    """A copy in double precision (of whole numbers and others as they are)."""
    array = value.detach().cpu().numpy()
    return array.astype(np.float64) if np.issubdtype(array.dtype, np.floating) else array.copy()


def _points(values: Any, y: Any) -> list[tuple[Any, ...]]:
    """One argument tuple for each row."""
    n = len(_first(values))
    each = [{k: v[i] for k, v in values.items()} if isinstance(values, Mapping) else values[i] for i in range(n)]
    return [(point,) for point in each] if y is None else [(point, y[i]) for i, point in enumerate(each)]


def _hint(found: np.ndarray) -> str:
    if found.ndim == 0:
        return (
            "It gives one number for each row: do not sum or average over the rows; a function of one point goes with "
            "vectorised=False."
        )
    if found.ndim == 2:
        return "It gives one number for each row: sum over the last axis, or drop it by [:, 0]."
    return "It gives one number for each row; a function of one point goes with vectorised=False."
