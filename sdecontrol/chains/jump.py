"""The chain of a jump process: exact kernels ``exp(h Q)``, or those of one jump a step at most, ``I + h Q``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..memory import Remembered, recall
from ..processes.finite import StateSpace
from ..processes.jump import JumpProcess
from ..processes.rates import exponential, less_diagonal, time_ordered
from ..shapes import DrawPaths, NoisePaths, Noises, StatePaths, States
from .categorical import CategoricalKernels

if TYPE_CHECKING:
    from scipy import sparse

_HELD = 1 << 26  # numbers of all tables that are kept; beyond, the last two are


class JumpChain(CategoricalKernels):
    """A jump process on a grid of times.

    With dense rates a value is the state that follows. With sparse ones (``scheme="euler"`` alone) it is a move: where
    it leads to from x is ``reference.moves[x]``.

    Args:
        scheme: "exact": ``p0(y | x) = exp(h Q)(x, y)``, of rates that depend on time their time-ordered exponential.
            "euler": ``I + h Q(t_k)``.

    Raises:
        ValueError: ``I + h Q`` has a negative entry, with the step and the number of steps that is enough; or
        ``scheme="exact"`` with sparse rates.
    """

    reference: JumpProcess

    def __init__(
        self, process: JumpProcess, clock: list[float], scheme: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.reference, self.scheme, self.values = process, scheme, process.control_shape[-1]
        self.set_times(clock, dtype, device)
        self.event_shape = process.event_shape
        self.noise_shape = self.control_shape = process.control_shape
        self.moves = None if process.moves is None else process.moves.to(device)
        if scheme == "exact" and process.sparse:
            raise ValueError(
                "scheme='exact' makes dense kernels, and the rates are sparse: leave it out for scheme='euler', or "
                "pass the rates dense (rates.to_dense()). (exact_solution(problem) needs neither.)"
            )
        if scheme == "euler":
            self._check_steps()
        several = 1 if process.autonomous else self.steps
        most = None if several * process.values * self.values <= _HELD else 2
        self._tables = Remembered(self._table, most or 2 * self.steps)
        self._kernels = Remembered(self._kernel, most or 2 * self.steps)

    def double(self) -> JumpChain:
        return JumpChain(self.reference, self.clock, self.scheme, torch.float64, self.times.device)

    def _check_steps(self) -> None:
        process, h = self.reference, self.step_sizes
        steps = [int(np.argmax(h))] if process.autonomous else range(self.steps)
        leaving = {k: -float(process.rates_at(self.clock[k]).diagonal().min()) for k in steps}
        worst = max(leaving, key=lambda k: h[k] * leaving[k])
        if h[worst] * leaving[worst] > 1:
            enough = int(np.ceil(process.horizon * max(leaving.values())))
            raise ValueError(
                f"scheme='euler': I + h Q has a negative entry at step {worst} of {self.steps} (h = {h[worst]:.3g}, "
                f"largest rate of leaving a state {leaving[worst]:.3g}). Use {enough} time steps or more"
                + ("." if process.sparse else ", or scheme='exact'.")
            )

    # ---------------------------------------------------------------- kernels

    def _key(self, k: int) -> tuple[int, float]:
        """Equal for steps with the same kernel."""
        return (0, round(self.step_sizes[k], 14)) if self.reference.autonomous else (k, self.step_sizes[k])

    def _kernel(self, k: int, h: float) -> Any:
        """All of a kernel, ``(n, n)`` in float64: a numpy array, or scipy's."""
        process = self.reference
        if self.scheme == "euler":
            return less_diagonal(h * process.rates_at(self.clock[k]), np.full(process.values, -1.0))
        if process.autonomous:
            made = exponential(process.rates_at(0.0), h)
        else:
            clock, single = self.clock, process.dtype != torch.float64
            made = time_ordered(process.rates_at, clock[k], clock[k + 1], np.eye(process.values), single=single)
        return made / made.sum(1, keepdims=True)

    def _table(self, k: int, h: float) -> Tensor:
        """``log p0`` of every value at every state, ``(n, 1, values)``."""
        kernel = self._kernels(k, h)
        if self.moves is not None:
            table = np.zeros(self.moves.shape)
            moves = self.moves.cpu().numpy()
            entries = kernel.tocoo()
            slot = (moves[entries.row] == entries.col[:, None]).argmax(1)
            table[entries.row, slot] = entries.data
            kernel = table
        return torch.from_numpy(kernel).clamp(min=0.0).log().to(self.times).unsqueeze(1)

    def log_probs(self, k: int, x: States, condition: Any = None) -> Noises:
        return recall(self, k, x, lambda: self._tables(*self._key(k))[x[:, 0]])

    def step(self, k: int, x: States, xi: Noises, c: Noises | None = None, condition: Any = None) -> States:
        chosen = super().step(k, x, xi, c, condition)
        return chosen if self.moves is None else self.moves[x[:, 0]].gather(1, chosen)

    def draws(
        self, noises: NoisePaths, shifts: NoisePaths, states: StatePaths | None, before: StatePaths | None = None
    ) -> DrawPaths:
        assert states is not None
        if self.moves is None:
            return states
        assert before is not None
        return (self.moves[before.squeeze(-1)] == states).long().argmax(-1, keepdim=True)

    def following(self, x: States) -> Tensor:
        """The states that values lead to from x, ``(batch, 1, values)``; -1 where there are fewer."""
        if self.moves is None:
            return super().following(x)
        return self.moves[x[:, 0]].unsqueeze(1)

    # ---------------------------------------------------------------- all states

    @property
    def space(self) -> StateSpace:
        return self.reference.space

    def transition(self, k: int) -> sparse.csr_array:
        from scipy import sparse

        return sparse.csr_array(self._kernels(*self._key(k)))
