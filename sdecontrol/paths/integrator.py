"""The one integrator: runs a chain of Gaussian kernels. Nothing else steps a process that carries likelihoods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.reverse import log_reversal, look_back, remembered
from ..chains.shifts import ShiftFunction
from ..errors import NonFiniteError
from ..memory import remembering
from ..tensors import apply_scale, nonfinite_rows
from .paths import Paths

__all__ = ["KEEP", "NoiseSource", "RunningCost", "check_likelihood", "explain_nonfinite", "integrate", "one_step"]

KEEP = ("all", "states", "end")

#: ``f(x, t) -> (batch,)``, with the condition where there is one.
RunningCost = Callable[[Tensor, Tensor, Any], Tensor]


class _Sums:
    """``sum_k c_k.xi_k`` and ``sum_k |c_k|^2/2`` of paths that are not kept, reduced a few steps at a time (one reduction
    a step would cost more than the step)."""

    most = 1 << 18  # numbers held of 64 paths: as many steps whatever the batch, so that sums have the same bits

    def __init__(self) -> None:
        self.shifts: list[Tensor] = []
        self.noises: list[Tensor] = []
        self.room = 0
        self.cross: Tensor | None = None
        self.square: Tensor | None = None

    def add(self, c: Tensor, xi: Tensor) -> None:
        if not self.shifts:
            self.room = max(1, min(64, self.most // (64 * max(1, c[:1].numel()))))
        self.shifts.append(c)
        self.noises.append(xi)
        if len(self.shifts) >= self.room:
            self._reduce()

    def _reduce(self) -> None:
        c = torch.stack(self.shifts)
        cross = _sum_rows(c * torch.stack(self.noises)).flatten(1).sum(1)
        square = 0.5 * _sum_rows(c * c).flatten(1).sum(1)
        self.cross = cross if self.cross is None else self.cross + cross
        self.square = square if self.square is None else self.square + square
        self.shifts, self.noises = [], []

    def result(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.shifts:
            self._reduce()
        if self.cross is None or self.square is None:
            zero = x.new_zeros(x.shape[0])
            return zero, zero
        return self.cross, self.square


def _sum_rows(x: Tensor) -> Tensor:
    """Sum over the first dimension, in an order that does not depend on the size of the others: torch sums the last few
    columns in another order than the rest, so their number is made a multiple of 64."""
    flat = x.flatten(1)
    count = flat.shape[1]
    if count % 64:
        flat = torch.nn.functional.pad(flat, (0, -count % 64))
    return flat.sum(0)[:count].unflatten(0, x.shape[1:])


class NoiseSource(Protocol):
    """``source[k]`` is the noise of step k, ``(batch, *noise)``."""

    def __getitem__(self, k: int, /) -> Tensor: ...


def one_step(
    chain: Chain, k: int, x: Tensor, xi: Tensor, shift: ShiftFunction | None, condition: Any
) -> tuple[Tensor, Tensor | None]:
    """``x_{k+1}`` and the shift ``c_k`` that was used (None for the reference)."""
    mean, scale = chain.kernel(k, x, condition)
    c = None if shift is None else shift(k, x, condition)
    z = xi if c is None else xi + c
    if scale.ndim < 3:
        return torch.addcmul(mean, scale, z), c
    return mean + apply_scale(scale, z, chain.event_ndim), c


def integrate(
    chain: Chain,
    x: Tensor,
    noise: NoiseSource,
    shift: ShiftFunction | None = None,
    *,
    condition: Any = None,
    running_cost: RunningCost | None = None,
    keep: str = "all",
    first: int = 0,
    last: int | None = None,
    replay: Callable[[], Paths] | None = None,
) -> Paths:
    """Run steps ``first .. last-1`` of a chain from states x ``(batch, *event)``.

    Where the chain has backward kernels, the running cost has -1 times the functional of the path that they make (``backward.py``, alpha = 1).

    The graph is kept if gradients are enabled and something requires them. Log-ratios are reduced after the loop from
    what it stored; finiteness is checked afterwards and located from the stored states.

    Raises:
        NonFiniteError: naming the quantity, the step and the number of rows.
    """
    last = chain.steps if last is None else last
    everything = keep == "all"
    begin, states = x, [x] if keep != "end" else None
    noises: list[Tensor] = []
    shifts: list[Tensor] = []
    cost: Tensor | None = None
    backward, back_draws, back_shifts = chain.backward, [], []
    if backward and shift is not None:
        shift = remembered(shift)
    sums = None if everything or shift is None else _Sums()
    # a cost that takes all states in one call waits for them
    along = getattr(running_cost, "along", None) if everything else None
    with remembering():
        for k in range(first, last):
            xi = noise[k]
            if running_cost is not None and along is None and chain.clock[k] >= 0:
                here = running_cost(x, chain.times[k], condition)
                cost = here * chain.step_sizes[k] if cost is None else torch.add(cost, here, alpha=chain.step_sizes[k])
            before = x
            x, c = one_step(chain, k, x, xi, shift, condition)
            if backward:
                back, b = look_back(chain, k, before, x, shift, condition)
                gained = log_reversal(chain, before, x, xi if c is None else xi + c, back, b)
                cost = -gained if cost is None else cost - gained
                if everything:
                    back_draws.append(back)
                    back_shifts.append(torch.zeros_like(back) if b is None else b)
            if states is not None:
                states.append(x)
            if everything:
                noises.append(xi)
                if c is not None:
                    shifts.append(c)
            elif sums is not None and c is not None:
                sums.add(c, xi)
    if along is not None and states is not None and last > (begun := max(first, chain.start)):
        values = along(torch.stack(states[begun - first : -1]), chain.times[begun:last])
        spent = (values * values.new_tensor(chain.step_sizes[begun:last]).unsqueeze(1)).sum(0)
        cost = spent if cost is None else cost + spent
    if everything and shift is None:
        zero = x.new_zeros(()).expand(x.shape[0], *chain.noise_shape)
        shifts = [zero] * (last - first)
    if cost is None:
        cost = x.new_zeros(x.shape[0])
    paths = Paths(
        chain,
        first=first,
        last=last,
        end=x,
        running_cost=cost,
        condition=condition,
        states=states,
        noises=noises if everything else None,
        shifts=shifts if everything else None,
        sums=None if everything else (_Sums() if sums is None else sums).result(x),
        replay=replay,
        backward_draws=back_draws if backward and everything else None,
        backward_shifts=back_shifts if backward and everything else None,
    )
    if not bool(torch.isfinite(x).all()) or not bool(torch.isfinite(cost).all()):
        if states is None:  # the same steps again with the states kept: raises, with the step's name
            with torch.no_grad():
                options: dict[str, Any] = {"condition": condition, "running_cost": running_cost}
                integrate(chain, begin, noise, shift, keep="states", first=first, last=last, **options)
        raise explain_nonfinite(paths, shift, running_cost)
    if sums is not None:
        check_likelihood(paths.kl(), chain)
    return paths


def check_likelihood(kl: Tensor, chain: Chain) -> None:
    """Raise where states are finite but ``|c|^2`` has overflowed.

    Raises:
        NonFiniteError: of the control, with the number of rows.
    """
    if not bool(torch.isfinite(kl.detach()).all()):
        raise _nonfinite("control", None, nonfinite_rows(kl.detach()), chain, ": its likelihood ratio overflows")


def explain_nonfinite(paths: Paths, shift: ShiftFunction | None, running_cost: RunningCost | None) -> NonFiniteError:
    """Find where a path stopped being finite, and what did it."""
    with torch.no_grad(), remembering():
        chain = paths.chain
        states = paths._states
        if states is None:
            return _nonfinite("state", None, nonfinite_rows(paths.end), chain)
        if rows := nonfinite_rows(states[0]):
            return _nonfinite("initial state", paths.first, rows, chain)
        for j, x in enumerate(states[:-1]):
            k = paths.first + j
            if running_cost is not None and chain.clock[k] >= 0:
                rows = nonfinite_rows(running_cost(x, chain.times[k], paths.condition))
                if rows:
                    return _nonfinite("running cost", k, rows, chain)
            if bool(torch.isfinite(states[j + 1]).all()):
                continue
            mean, scale = chain.kernel(k, x, paths.condition)
            if rows := nonfinite_rows(mean):
                large = float(x.abs().max())
                return _nonfinite("drift", k, rows, chain, f" (largest |x| there: {large:.3g})")
            if not bool(torch.isfinite(scale).all()):
                rows = nonfinite_rows(scale) if scale.ndim and scale.shape[0] == x.shape[0] else x.shape[0]
                return _nonfinite("diffusion", k, rows, chain)
            if shift is not None and (rows := nonfinite_rows(shift(k, x, paths.condition))):
                return _nonfinite("control", k, rows, chain)
            return _nonfinite("state", k, nonfinite_rows(states[j + 1]), chain)
        if rows := nonfinite_rows(paths.running_cost):
            return _nonfinite("running cost", None, rows, chain)
    return _nonfinite("state", None, nonfinite_rows(paths.end), chain)


def _nonfinite(what: str, step: int | None, rows: int, chain: Chain, more: str = "") -> NonFiniteError:
    where = "" if step is None else f" at step {step} of {chain.steps} (t = {chain.clock[step]:.4g})"
    remedy = {
        "initial state": "Check the initial law.",
        "drift": "Check the drift there; if it merely explodes, use more time steps.",
        "diffusion": "Check the diffusion there.",
        "control": "Check the control there (a smaller learning rate, if it was being trained).",
        "running cost": "Check the running cost there.",
        "state": "Use more time steps, or check drift and diffusion.",
    }[what]
    return NonFiniteError(
        f"{what} is not finite{where}, in {rows} row{'s' if rows != 1 else ''}{more}. {remedy}",
        what=what,
        step=step,
        rows=rows,
    )
