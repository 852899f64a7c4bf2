"""The best kernel that is a product over positions, where the soft-optimal one is none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..processes.finite import StateSpace

if TYPE_CHECKING:
    from scipy import sparse

_SWEEPS = 500
_TOLERANCE = 1e-13


def tokens_of(space: StateSpace) -> tuple[np.ndarray, int]:
    """``index(x) = sum weights x``, and the number of values: what the tokens of a state are read off with."""
    return space.weights.numpy(), space.values


def best_products(
    matrix: sparse.csr_array, tokens: tuple[np.ndarray, int], after: np.ndarray, free: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each state x, the product ``q = prod_l q_l`` that maximises ``E_q[w(y)] - KL(q || p0(. | x))``, p0 a product
    too.

    Coordinate ascent (mean-field variational inference): ``q_l(v) ~ p_l(v) exp(E_q[w(y) | y_l = v])``, position after
    position, from the marginals of ``p0 exp(w)``. Each update raises the objective; its maximum may be a local one.

    Args:
        matrix: ``(rows, n)``, p0 from some states x. tokens: of :func:`tokens_of`. after: w, ``(n,)``. free: the values
            0 .. free-1 may be tilted among one another; the others (the mask) keep their probability.

    Returns:
        ``log q_l/p_l`` ``(rows, positions, values)``, 0 where p_l is; and the maxima ``(rows,)``.
    """
    weights, values = tokens
    rows, positions = len(matrix.indptr) - 1, len(weights)
    columns, starts = np.asarray(matrix.indices), np.asarray(matrix.indptr)
    row = np.repeat(np.arange(rows), np.diff(starts))
    cell = [row * values + (columns // weight) % values for weight in weights]
    w, p, size = after[columns], matrix.data, rows * values

    def by_value(j: int, numbers: np.ndarray) -> np.ndarray:
        return np.bincount(cell[j], numbers, size).reshape(rows, values)

    reference = [by_value(j, p) for j in range(positions)]
    top = np.maximum.reduceat(w, starts[:-1])
    tilted = p * np.exp(w - top[row])
    ratios = []
    for j in range(positions):
        found = by_value(j, tilted)
        ratios.append(_log_ratio(found, reference[j], free))
    for _ in range(_SWEEPS):
        moved = 0.0
        for j in range(positions):
            others = sum(ratios[i].reshape(-1)[cell[i]] for i in range(positions) if i != j)
            mass = p * np.exp(others)  # of the others' product, times p_j
            below = by_value(j, mass)
            mean = by_value(j, mass * w) / np.where(below > 0, below, 1.0)
            peak = np.where(reference[j] > 0, mean, -np.inf).max(1, keepdims=True)
            found = reference[j] * np.exp(mean - peak)
            new = _log_ratio(found, reference[j], free)
            moved = max(moved, float(np.abs((new - ratios[j]) * reference[j]).max()))
            ratios[j] = new
        if moved < _TOLERANCE:
            break
    total = sum(ratios[i].reshape(-1)[cell[i]] for i in range(positions))
    gained = np.bincount(row, p * np.exp(total) * (w - total), rows)
    return np.stack(ratios, 1), gained


def _log_ratio(weights: np.ndarray, reference: np.ndarray, free: int) -> np.ndarray:
    """``log q/p`` of q in proportion to the weights among the values that are free; 0 elsewhere."""
    made, p = np.zeros_like(reference), reference[:, :free]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = weights[:, :free] / weights[:, :free].sum(1, keepdims=True)
        made[:, :free] = np.where(p > 0, np.log(share) - np.log(p / p.sum(1, keepdims=True)), 0.0)
    return made


def best_tokens(
    matrix: sparse.csr_array, states: np.ndarray, tokens: tuple[np.ndarray, int], after: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same where one position moves in a step, drawn first, and then its token is: the best law of the token of
    each position, ``q_l(v) ~ p_l(v) exp(w(y))``.

    Args:
        states: the indices of the states x, ``(rows,)``.
    """
    weights, values = tokens
    rows, columns, starts = len(states), np.asarray(matrix.indices), np.asarray(matrix.indptr)
    row = np.repeat(np.arange(rows), np.diff(starts))
    w, p, total, ratios = after[columns], matrix.data, np.zeros(len(row)), []
    for weight in weights:
        token = (columns // weight) % values
        moved = np.flatnonzero(token != (states[row] // weight) % values)
        cell = row[moved] * values + token[moved]
        top = np.full(rows, -np.inf)
        np.maximum.at(top, row[moved], w[moved])
        mass = np.bincount(row[moved], p[moved], rows)
        tilted = np.bincount(row[moved], p[moved] * np.exp(w[moved] - top[row[moved]]), rows)
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = np.log(tilted / mass) + top
        total[moved] = w[moved] - mean[row[moved]]
        ratios.append(np.bincount(cell, total[moved], rows * values).reshape(rows, values))
    return np.stack(ratios, 1), np.bincount(row, p * np.exp(total) * (w - total), rows)
