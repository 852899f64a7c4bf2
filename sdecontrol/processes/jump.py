"""``JumpProcess``: a continuous-time Markov chain on a finite number of states, given by its rates."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from ..precision import at_least_single
from ..shapes import Scalar, States
from ..tensors import as_float, probing
from .finite import FiniteLaw, StateSpace, check_tokens, probe_tokens
from .laws import Dirac
from .rates import Matrix, moves_between, rate_matrix
from .reference import Reference

_MOST_DENSE = 4096
_USUALLY_EXACT = 1024  # states up to which the kernels are exact where no scheme is asked for
_CHECKED = 5  # times at which a function of time is tried


class JumpProcess(Reference):
    """A continuous-time Markov chain on the states 0 .. n-1: from x it jumps to y at the rate ``rates[x, y]``.

    States are int64 of shape ``(batch, 1)``. A control tilts the rates, ``q^u(x, y) = q(x, y) exp(u(x, y))``: it is
    called as ``control(x, t)`` and gives ``(batch, 1, n)``, one number for each state y. With sparse rates it gives
    ``(batch, 1, m)``, one for each of the m moves: ``moves[x, j]`` is where move j leads to from x.

    Chains: ``scheme="exact"``, the kernel ``exp(h Q)`` (the default up to 1024 states; dense, and so refused for
    sparse rates), or ``"euler"``, the kernel ``I + h Q`` of one jump a step at most (the default beyond, and of sparse
    rates), which is refused where an entry turns negative. A running cost is paid at the left end of a step.

    Args:
        rates: ``(n, n)``, >= 0 off the diagonal, rows that sum to zero: a tensor, dense or sparse (for large n), or
            scipy's sparse matrix; or a function ``t -> (n, n)`` of one of these kinds, t a 0-d float64 tensor. Sparse
            ones keep their pattern at all times. With scipy's the process has torch's default dtype, else that of the
            rates.
        horizon: the end time T > 0.
        initial: where paths begin: a state (int), probabilities ``(n,)``, or a law of int64 states ``(1,)``; None: it
            is given to :class:`ControlProblem`.

    Attributes:
        values: n. sparse: whether the rates are. moves: ``(n, m)`` int64 of sparse rates, -1 where a state has fewer;
            else None.

    Raises:
        TypeError, ValueError: naming the argument: a negative rate, a row that does not sum to zero, another shape.
    """

    gaussian = of_noise = differentiable = False
    state_dtype = torch.int64

    def __init__(self, rates: Any, horizon: float = 1.0, initial: Any = None) -> None:
        self.horizon = as_float("horizon", horizon, positive=True)
        self.rates, self.autonomous = rates, not callable(rates)
        first = self._call(0.0)
        matrix = rate_matrix("rates", first)
        self.values, self.sparse = matrix.shape[0], not isinstance(matrix, np.ndarray)
        if not self.sparse and self.values > _MOST_DENSE:
            raise ValueError(
                f"rates: a dense matrix of {self.values} states is not held ({_MOST_DENSE} at most); pass it sparse "
                "(rates.to_sparse_csr(), or scipy's)."
            )
        known = isinstance(first, Tensor)
        self.dtype = at_least_single(first.dtype) if known else at_least_single(torch.get_default_dtype())
        self.device = first.device if known else None
        self._constant = matrix if self.autonomous else None
        self.moves: Tensor | None = None
        times = np.linspace(0.0, self.horizon, 1 if self.autonomous else _CHECKED).tolist()
        found = [self.rates_at(t) for t in times]
        if self.sparse:
            self.moves = torch.from_numpy(moves_between(sum(abs(one) for one in found))).to(self.device or "cpu")
        self.event_shape = torch.Size((1,))
        self.control_shape = torch.Size((1, self.values if self.moves is None else self.moves.shape[1]))
        self.own_initial = self._initial(initial)

    @property
    def space(self) -> StateSpace:
        """All states."""
        return StateSpace(self.values, self.event_shape)

    @property
    def default_scheme(self) -> str:  # type: ignore[override]
        return "euler" if self.sparse or self.values > _USUALLY_EXACT else "exact"

    def _call(self, t: float) -> Any:
        if not callable(self.rates):
            return self.rates
        with probing("rates", "rates(t), t 0-d float64"):
            return self.rates(torch.tensor(t, dtype=torch.float64))

    def _initial(self, initial: Any) -> Any:
        device = self.device or torch.device("cpu")
        if initial is None:
            return None
        if isinstance(initial, int) and not isinstance(initial, bool):
            if not 0 <= initial < self.values:
                raise ValueError(f"initial must be a state from 0 to {self.values - 1}, got {initial}.")
            return Dirac(torch.tensor([initial], device=device))
        if isinstance(initial, Tensor) and initial.is_floating_point():
            if initial.shape != (self.values,):
                raise ValueError(
                    f"initial must be probabilities of shape ({self.values},), one for each state, got "
                    f"{tuple(initial.shape)}."
                )
            return FiniteLaw(initial.to(dtype=self.dtype), self.space)
        if not isinstance(initial, Distribution):
            got = initial.dtype if isinstance(initial, Tensor) else type(initial).__name__
            raise TypeError(
                f"initial must be a state (an int), probabilities (n,), or a law of int64 states (1,), got {got}."
            )
        return initial

    # ---------------------------------------------------------------- rates

    def rates_at(self, t: float) -> Matrix:
        """The rates at time t, ``(n, n)`` in float64 on the CPU: a numpy array, or scipy's ``csr_array``.

        Raises:
            TypeError, ValueError: of a function of time, as of the argument.
        """
        if self._constant is not None:
            return self._constant
        matrix = rate_matrix(f"rates(t = {t:.4g})", self._call(t), self.values)
        if self.sparse != (not isinstance(matrix, np.ndarray)):
            raise TypeError("rates(t) must be sparse at all times or dense at all times.")
        if self.moves is not None:
            self._check_pattern(matrix, self.moves.cpu().numpy(), t)
        return matrix

    @staticmethod
    def _check_pattern(matrix: Matrix, moves: np.ndarray, t: float) -> None:
        entries = matrix.tocoo()
        lost = (entries.data > 0) & ~(moves[entries.row] == entries.col[:, None]).any(1)
        if lost.any():
            at = np.flatnonzero(lost)[0]
            raise ValueError(
                f"rates(t = {t:.4g}) has a rate from state {entries.row[at]} to state {entries.col[at]}, which rates "
                f"at {_CHECKED} times from 0 to the horizon have not: sparse rates keep their pattern. Give it a rate "
                "above 0 at time 0, however small."
            )

    # ---------------------------------------------------------------- what a problem asks of a reference

    def check_states(self, name: str, x: States) -> None:
        check_tokens(name, x, self.values)

    def probe_states(self, rows: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> States:
        return probe_tokens(self.values, rows, self.event_shape, device, seed)

    def numbers(self, x: States, t: Scalar, condition: Any = None) -> dict[str, Tensor]:
        matrix = self.rates_at(float(t))
        entries = matrix if isinstance(matrix, np.ndarray) else matrix.data
        return {"rates": torch.from_numpy(np.sort(entries, axis=None)[np.linspace(0, entries.size - 1, 8).astype(int)])}

    def describe(self) -> dict[str, Any]:
        return {"kind": "JumpProcess", "states": self.values, "horizon": self.horizon}
