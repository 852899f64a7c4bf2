"""Controls within bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.shifts import ShiftFunction
from ..problems.problem import ControlProblem
from ..shapes import Controls, States
from .base import Control, StartedControl
from .build import build_control
from .saved import CONTROLS, Context, Saved


def check_bounds(bounds: Any, chain: Chain) -> tuple[Tensor, Tensor]:
    """``(low, high)``, numbers or tensors like a control, as tensors of the chain.

    Raises:
        TypeError, ValueError: no pair, a wrong shape, nan, or 0 is not within them.
    """
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise TypeError(f"bounds must be a pair (low, high), got {bounds!r}.")
    try:
        low, high = (torch.as_tensor(b, dtype=chain.times.dtype, device=chain.times.device) for b in bounds)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"bounds must be numbers or tensors, got {bounds!r} ({error}).") from error
    for name, b in (("low", low), ("high", high)):
        if b.shape not in ((), chain.control_shape) or bool(b.isnan().any()):
            raise ValueError(
                f"bounds: {name} must be a number or of shape {tuple(chain.control_shape)}, got {tuple(b.shape)}."
            )
    if bool((low > 0).any()) or bool((high < 0).any()):
        raise ValueError(f"bounds must include 0, the control of the reference, got {bounds!r}.")
    return low, high


@CONTROLS.register("bounded")
class BoundedControl(Control):
    """A control v squashed into bounds, ``u = high tanh(v / high)`` where v > 0 and ``low tanh(v / low)`` where v < 0.

    ``u = v`` to first order at 0, the slope is continuous there, and ``u`` stays inside; an infinite bound is none. It
    is the control of the path law that it makes: log-ratios, weights and log Z are exact for it, as for any other.
    """

    low: Tensor
    high: Tensor

    def __init__(self, inner: Control, low: Tensor, high: Tensor) -> None:
        super().__init__(inner.event_shape, inner.control_shape, inner.first_time, inner.last_time)
        self.inner = inner
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)
        self.learning_rate, self.most_times = inner.learning_rate, inner.most_times

    @property
    def configuration(self) -> dict[str, Any]:
        return {"inner": CONTROLS.describe(self.inner), "low": self.low.tolist(), "high": self.high.tolist()}

    @classmethod
    def from_saved(cls, saved: Saved, context: Context) -> BoundedControl:
        bounds = check_bounds((saved["low"], saved["high"]), context.chain)
        return cls(CONTROLS.make(saved["inner"], context), *bounds)

    def squash(self, v: Controls) -> Controls:
        size = torch.where(v < 0, -self.low, self.high)
        free = size.isinf()
        size = size.masked_fill(free, 1.0)
        return torch.where(free, v, size * (v / size).tanh())

    def at(self, x: States, t: Tensor, y: Any = None) -> Controls:
        return self.squash(self.inner.at(x, t, y))

    def tables(self, chain: Chain) -> tuple[Tensor, ...]:
        return self.inner.tables(chain)

    def on_chain(self, chain: Chain, tables: Sequence[Any] | None = None) -> ShiftFunction:
        inner = self.inner.on_chain(chain, tables)
        return lambda k, x, y: chain.shift_at(k, x, self.squash(chain.control(k, inner(k, x, y))), y)


def bounded(problem: ControlProblem, chain: Chain, control: Any, bounds: Any, seed: int) -> Control:
    """The control that :func:`build_control` makes, within bounds; of one that is bounded already, new bounds.

    Raises:
        TypeError, ValueError: bounds that are none, or a problem whose controls have none.
    """
    if not chain.of_noise or problem.reference.tangential:
        raise ValueError(
            f"bounds: they are for shifts of noise in flat space, and the reference is a "
            f"{type(problem.reference).__name__}; leave bounds out."
        )
    if chain.start:
        raise ValueError("bounds: the problem has a learned start, which has none; make it of sc.Dirac(x0).")
    low, high = check_bounds(bounds, chain)
    if bool((low == 0).any()) or bool((high == 0).any()):
        raise ValueError(
            f"bounds must leave room on both sides of 0 for a control that is trained, got {bounds!r}: at an edge it "
            "has no gradient. Let the input act on one side inside the drift, or use sc.RecedingHorizon(bounds=)."
        )
    made = build_control(problem, chain, control, seed=seed)
    assert not isinstance(made, StartedControl)
    return BoundedControl(made.inner if isinstance(made, BoundedControl) else made, low, high)
