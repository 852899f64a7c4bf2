"""The Ising model on a rectangle of spins, as a Gibbs target on tokens whose log Z is known by transfer matrices."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..chains.masked import masked_diffusion
from ..problems.problem import ControlProblem
from ..tensors import as_float, check_count

_WIDEST = 12  # of a row, whose states are 2^12


class Ising:
    """``pi(s) = exp(coupling sum_{neighbours} s s' + field sum s)/Z``, spins s = 2 x - 1 of tokens x in {0, 1}.

    log Z is exact, by products with the transfer matrix between rows (Kramers & Wannier 1941). ``problem()`` is the
    control problem whose optimum ends in pi and whose Z is that of pi: the reference unmasks uniform tokens, whose law
    at the end is the product one at any number of steps, and ``r = log pi + n log 2`` of n spins.

    Args:
        rows, columns: of the rectangle; one of them at most 12. coupling: inverse temperature times J; the infinite
            lattice is critical at 0.4407. field: inverse temperature times h. periodic: neighbours across the edges (of
            two rows, each pair twice).

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(self, rows: int, columns: int, coupling: float, field: float = 0.0, *, periodic: bool = False) -> None:
        check_count("rows", rows)
        check_count("columns", columns)
        if min(rows, columns) > _WIDEST:
            raise ValueError(
                f"rows, columns: {rows} x {columns} has no transfer matrix of 2^{_WIDEST} states; one of them must be "
                f"{_WIDEST} at most."
            )
        self.rows, self.columns, self.periodic = rows, columns, periodic
        self.coupling, self.field = as_float("coupling", coupling), as_float("field", field)

    def __repr__(self) -> str:
        edges = "periodic" if self.periodic else "free"
        return f"Ising({self.rows} x {self.columns}, coupling={self.coupling:g}, field={self.field:g}, {edges})"

    def log_density(self, x: Tensor) -> Tensor:
        """The logarithm of the unnormalised density of tokens ``(batch, rows, columns)``, ``(batch,)``."""
        s = 2.0 * x - 1.0
        if self.periodic:
            pairs = (s * s.roll(1, 1)).sum((1, 2)) + (s * s.roll(1, 2)).sum((1, 2))
        else:
            pairs = (s[:, 1:] * s[:, :-1]).sum((1, 2)) + (s[:, :, 1:] * s[:, :, :-1]).sum((1, 2))
        return self.coupling * pairs + self.field * s.sum((1, 2))

    @cached_property
    def log_z(self) -> float:
        """Exact, to rounding."""
        long, wide = max(self.rows, self.columns), min(self.rows, self.columns)
        s = 2.0 * ((np.arange(2**wide)[:, None] >> np.arange(wide)) & 1) - 1.0
        along = (s * np.roll(s, 1, 1)).sum(1) if self.periodic else (s[:, 1:] * s[:, :-1]).sum(1)
        row = np.exp(self.coupling * along + self.field * s.sum(1))
        transfer = np.exp(self.coupling * (s @ s.T)) * row  # from one row to the next, which pays for itself
        made = np.eye(2**wide) if self.periodic else row
        log_scale = 0.0
        for _ in range(long if self.periodic else long - 1):
            made = made @ transfer
            top = made.max()
            made, log_scale = made / top, log_scale + float(np.log(top))
        total = np.trace(made) if self.periodic else made.sum()
        return float(np.log(total)) + log_scale

    def problem(self, order: str = "independent", steps: int | None = None) -> ControlProblem:
        """The control problem of this target, alpha = 1.

        Args:
            order, steps: of :func:`masked_diffusion`. "independent" (at any number of steps; None: one, which particles
                need no more of) or "random", one spin a step, where tilts of tokens have no floor.
        """
        shape, n = (self.rows, self.columns), self.rows * self.columns

        def uniform(x: Tensor, s: Tensor) -> Tensor:
            return torch.zeros((*x.shape, 2), dtype=s.dtype, device=x.device)

        steps = 1 if steps is None and order == "independent" else steps
        chain = masked_diffusion(uniform, shape, 2, steps, order=order)
        constant = n * float(np.log(2.0))
        return ControlProblem(chain, reward=lambda x: self.log_density(x) + constant)
