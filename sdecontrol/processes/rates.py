"""Rate matrices of continuous-time Markov chains, dense or sparse, and the exponentials that they are asked for.

Everything is in float64 on the CPU, as numpy arrays ``(n, n)`` or scipy's ``csr_array``. The matrices have entries
>= 0 off the diagonal, and so has their exponential everywhere. It is summed from terms >= 0 alone (uniformisation,
Jensen 1953: ``exp(tA) = exp(-st) exp(t(A + s))`` with s that leaves no negative entry), where scipy's Pade approximants
cancel: a small probability then keeps its digits, and is never below 0, so that it has a logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Matrix = Any  #: a numpy array ``(n, n)``, or a sparse ``csr_array``

_PIECE = 32.0  # norm of a matrix whose Taylor series is summed at once
_REST = 1e-24  # what is left of it
_RELATIVE, _SINGLE, _LEAST = 1e-12, 1e-7, 1e-20  # tolerances of a time-ordered exponential
_STEPS = 2  # that it takes at least, to see rates change


def rate_matrix(name: str, value: Any, states: int | None = None) -> Matrix:
    """Rates as a user gives them, checked: a tensor, dense or sparse, or scipy's sparse matrix.

    The diagonal is set to minus the sum of the other rates, of which it may differ by rounding.

    Raises:
        TypeError, ValueError: another type or shape, a negative rate, or a row that does not sum to zero.
    """
    matrix, single = _plain(name, value)
    n = matrix.shape[0]
    if len(matrix.shape) != 2 or matrix.shape[1] != n or n < 2 or states not in (None, n):
        wanted = "(n, n), n >= 2" if states is None else f"({states}, {states})"
        raise ValueError(f"{name} must have shape {wanted}, one rate from each state to each, got {matrix.shape}.")
    entries = matrix if isinstance(matrix, np.ndarray) else matrix.data
    if not np.isfinite(entries).all():
        raise ValueError(f"{name} has {int((~np.isfinite(entries)).sum())} non-finite entries.")
    row, column, rate, diagonal = _off_diagonal(matrix)
    if rate.size and rate.min() < 0:
        at = int(rate.argmin())
        raise ValueError(
            f"{name} must be >= 0 off the diagonal: the rate from state {row[at]} to state {column[at]} is "
            f"{rate[at]:.3g}."
        )
    leaving = np.bincount(row, rate, n)
    total = leaving + diagonal
    worst = int(np.abs(total).argmax())
    if abs(total[worst]) > (1e-5 if single else 1e-9) * max(1e-300, leaving.max(), np.abs(diagonal).max()):
        raise ValueError(
            f"{name} must have rows that sum to zero: row {worst} sums to {total[worst]:.3g}. The diagonal is minus "
            "the rate of leaving a state; with zeros there, pass rates - torch.diag(rates.sum(1))."
        )
    if isinstance(matrix, np.ndarray):
        matrix = matrix.copy()
        matrix[np.diag_indices(n)] = -leaving
        return matrix
    every = np.arange(n)
    index = np.concatenate([row, every]), np.concatenate([column, every])
    return type(matrix)((np.concatenate([rate, -leaving]), index), shape=matrix.shape)


def _off_diagonal(matrix: Matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and entries off the diagonal, and the diagonal."""
    if isinstance(matrix, np.ndarray):
        off = ~np.eye(len(matrix), dtype=bool)
        row, column = off.nonzero()
        return row, column, matrix[off], matrix.diagonal()
    entries = matrix.tocoo()
    off = entries.row != entries.col
    diagonal = np.bincount(entries.row[~off], entries.data[~off], matrix.shape[0])
    return entries.row[off], entries.col[off], entries.data[off], diagonal


def _plain(name: str, value: Any) -> tuple[Matrix, bool]:
    """As numpy or scipy have it, in float64, and whether it came in single precision."""
    from scipy import sparse

    if sparse.issparse(value):
        if value.dtype.kind != "f":
            raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}; use {name}.astype(float).")
        return sparse.csr_array(value, dtype=np.float64), value.dtype.itemsize < 8
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a torch tensor (n, n), a sparse one, scipy's sparse matrix, or a function of time that "
            f"returns one, got {type(value).__name__}."
        )
    if not value.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}; use {name}.float().")
    single, value = value.dtype != torch.float64, value.detach().to("cpu", torch.float64)
    if value.layout == torch.strided:
        return value.numpy(), single
    value = (value if value.layout == torch.sparse_coo else value.to_sparse_coo()).coalesce()
    index = value.indices().numpy()
    return sparse.csr_array((value.values().numpy(), (index[0], index[1])), shape=tuple(value.shape)), single


def _diagonal(values: np.ndarray) -> Matrix:
    from scipy import sparse

    return sparse.csr_array(sparse.diags_array(values))


def less_diagonal(matrix: Matrix, values: np.ndarray) -> Matrix:
    """``A - diag(values)``."""
    return matrix - (np.diag(values) if isinstance(matrix, np.ndarray) else _diagonal(values))


def _scaled(matrix: Matrix, time: float) -> tuple[Matrix, float, float]:
    """``time (A + s)`` with entries >= 0, ``time s``, and the norm of the first."""
    shift = max(0.0, -float(matrix.diagonal().min()))
    positive = less_diagonal(matrix, np.full(matrix.shape[0], -shift)) * time
    return positive, shift * time, float(abs(positive).sum(1).max())


def _terms(size: float) -> int:
    """Of the series of an exponential of this norm."""
    count, term = 1, 1.0
    while term > _REST or count <= size:
        term *= size / count
        count += 1
    return count


def _series(positive: Matrix, size: float, y: np.ndarray) -> np.ndarray:
    term, total = y, y.copy()
    for j in range(1, _terms(size)):
        term = (positive @ term) / j
        total += term
    return total


def exponential_action(matrix: Matrix, time: float, y: np.ndarray) -> np.ndarray:
    """``exp(time A) y`` for y ``(n,)`` or ``(n, c)``, each entry of y >= 0 to rounding relative to itself."""
    positive, shift, size = _scaled(matrix, time)
    pieces = max(1, math.ceil(size / _PIECE))
    for _ in range(pieces):
        y = _series(positive / pieces, size / pieces, y) * math.exp(-shift / pieces)
    return y


def exponential(matrix: Matrix, time: float) -> np.ndarray:
    """``exp(time A)``, dense ``(n, n)``, by doubling."""
    positive, shift, size = _scaled(matrix, time)
    doublings = max(0, math.ceil(math.log2(max(size, 1e-300))))
    positive = np.asarray(positive if isinstance(positive, np.ndarray) else positive.toarray()) / 2**doublings
    total = _series(positive, size / 2**doublings, np.eye(len(positive))) * math.exp(-shift / 2**doublings)
    for _ in range(doublings):
        total = total @ total
    return total


def time_ordered(
    generator: Callable[[float], Matrix],
    first: float,
    last: float,
    y: np.ndarray,
    *,
    forward: bool = False,
    single: bool = False,
) -> np.ndarray:
    """``U y`` with ``U = U(first, last)``, the time-ordered exponential of ``A(t)``: backwards,
    ``dU(s, last)/ds = -A(s) U(s, last)``; or ``U' y``. By scipy's DOP853 with a relative tolerance of 1e-12 in each
    entry down to 1e-20 of the largest; it finds where rates jump in time.

    Args:
        y: ``(n,)`` or ``(n, c)``, >= 0.
        forward: U'.
        single: A(t) is computed in single precision, and so smooth to its rounding only: a tolerance of 1e-7.
    """
    from scipy.integrate import solve_ivp

    def slope(elapsed: float, flat: np.ndarray) -> np.ndarray:
        matrix = generator(first + elapsed if forward else last - elapsed)
        return ((matrix.T if forward else matrix) @ flat.reshape(y.shape)).ravel()

    span, least = last - first, _LEAST * float(y.max())
    relative = _SINGLE if single else _RELATIVE
    found = solve_ivp(slope, (0.0, span), y.ravel(), "DOP853", rtol=relative, atol=least, max_step=span / _STEPS)
    return found.y[:, -1].reshape(y.shape).clip(min=0.0)


def moves_between(matrix: Matrix) -> np.ndarray:
    """``(n, m)``: the states that a state leads to, itself among them; -1 where there are fewer.

    Where the differences ``y - x`` are few, as of a birth-death process, a column is one of them, in rising order, and
    so means the same move from every state; else the states that follow are in rising order.
    """
    n = matrix.shape[0]
    entries = (abs(matrix) + _diagonal(np.ones(n))).tocsr()
    entries.sort_indices()
    counts = np.diff(entries.indptr)
    row, column = np.repeat(np.arange(n), counts), entries.indices.astype(np.int64)
    distinct = np.unique(column - row)
    widest = int(counts.max())
    if len(distinct) <= 2 * widest:
        widest, slot = len(distinct), np.searchsorted(distinct, column - row)
    else:
        slot = np.arange(len(row)) - np.repeat(entries.indptr[:-1], counts)
    table = np.full((n, widest), -1, dtype=np.int64)
    table[row, slot] = column
    return table
