"""Transition matrices between all states of a finite space, from kernels that are products over positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..processes.finite import LARGEST, StateSpace

if TYPE_CHECKING:
    from scipy import sparse

_ENTRIES = 1 << 21  # made at once
MOST_ENTRIES = 50_000_000  #: of a matrix


def product_transition(space: StateSpace, log_probs: Callable[[Tensor], Tensor]) -> sparse.csr_array:
    """The transition matrix of a kernel whose positions are independent given the state.

    Only values that can follow are multiplied out: of a masked diffusion that is ``(2V + 1)^L`` entries in place of
    ``(V + 1)^(2L)``.

    Args:
        log_probs: states ``(batch, *shape)`` -> ``(batch, *shape, values)``, -inf where a value cannot follow.

    Raises:
        OverflowError: more than 5e7 entries, or 1e7 states.

    Returns:
        ``(n, n)`` in float64: rows are the states now, columns those that follow, in the order of the space.
    """
    from scipy import sparse

    if space.size > LARGEST:
        raise OverflowError(f"{space.values}^{space.positions} states are more than the {LARGEST:.0e} that are listed.")
    weights, low, total, parts = space.weights, 0, 0.0, []
    size = max(1, _ENTRIES // (space.positions * space.values))
    while low < space.size:
        index = torch.arange(low, min(low + size, space.size))
        with torch.no_grad():
            rows = log_probs(space.states(index)).detach().to("cpu", torch.float64)
        rows = rows.reshape(len(index), space.positions, space.values)
        low += len(index)
        counts = (rows > -torch.inf).sum(-1).double().prod(-1).cumsum(0)
        total, begun = total + float(counts[-1]), 0
        if total > MOST_ENTRIES:
            raise OverflowError(
                f"a step has more than {MOST_ENTRIES:.0e} transitions between the {space.size} states; use fewer "
                "positions or tokens, or estimate with particles."
            )
        while begun < len(index):  # as many states as have so many entries, and one at least
            base = float(counts[begun - 1]) if begun else 0.0
            upto = max(begun + 1, int(torch.searchsorted(counts, base + _ENTRIES, right=True)))
            parts.append(_block(rows[begun:upto], weights, space.size))
            begun = upto
    return sparse.csr_array(sparse.vstack(parts, format="csr")) if len(parts) > 1 else parts[0]


def _block(log_probs: Tensor, weights: Tensor, size: int) -> sparse.csr_array:
    """Some rows of the matrix: position by position, each entry is followed by one for every value of the next."""
    from scipy import sparse

    row = torch.arange(len(log_probs))
    column, total = torch.zeros_like(row), torch.zeros(len(row), dtype=torch.float64)
    for j, weight in enumerate(weights.tolist()):
        here = log_probs[:, j][row]
        entry, value = (here > -torch.inf).nonzero(as_tuple=True)
        row, column = row[entry], column[entry] + weight * value
        total = total[entry] + here[entry, value]
    starts = np.concatenate([[0], np.cumsum(np.bincount(row.numpy(), minlength=len(log_probs)))])
    return sparse.csr_array((total.exp().numpy(), column.numpy(), starts), shape=(len(log_probs), size))


def single_transition(space: StateSpace, margins: Callable[[Tensor], Tensor]) -> sparse.csr_array:
    """The transition matrix of a kernel that changes one position a step, from the margins of all of them.

    Args:
        margins: states ``(batch, *shape)`` -> ``(batch, *shape, values)``: the logarithm of the probability that a
            position has a value at the next step. A state of which no position can change stays.
    """
    from scipy import sparse

    if space.size > LARGEST:
        raise OverflowError(f"{space.values}^{space.positions} states are more than the {LARGEST:.0e} that are listed.")
    rows, columns, numbers = [], [], []
    for index in torch.arange(space.size).split(max(1, _ENTRIES // (space.positions * space.values))):
        x = space.states(index)
        with torch.no_grad():
            probs = margins(x).detach().to("cpu", torch.float64).exp()
        probs = probs.reshape(len(index), space.positions, space.values)
        now = x.reshape(len(index), -1, 1)
        move = probs.scatter(2, now, 0.0)
        row, place, value = move.nonzero(as_tuple=True)
        rows.append(index[row])
        columns.append(index[row] + space.weights[place] * (value - now[row, place, 0]))
        numbers.append(move[row, place, value])
        still = index[move.sum((1, 2)) == 0]
        rows.append(still)
        columns.append(still)
        numbers.append(torch.ones(len(still), dtype=torch.float64))
    entries = torch.cat(numbers).numpy(), (torch.cat(rows).numpy(), torch.cat(columns).numpy())
    return sparse.csr_array(entries, shape=(space.size, space.size))
