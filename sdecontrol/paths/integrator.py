"""The one integrator: runs a chain. Nothing else steps a process that carries likelihoods."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.shifts import ShiftFunction
from ..errors import NonFiniteError
from ..memory import once_a_step, remembering
from ..precision import full_precision
from ..shapes import Noises, PerPath, Scalar, States
from ..tensors import changed_in_place, nonfinite_rows
from .paths import Paths, Record, Totals, sum_steps
from .rows import Some

KEEP = ("all", "states", "end")

#: ``f(x, t)``, with the condition where there is one.
RunningCost = Callable[[States, Scalar, Any], PerPath]


class _Sums:
    """Log-ratio and KL of paths that are not kept, reduced a few steps at a time (one reduction a step would cost more
    than the step)."""

    most = 1 << 18  # numbers held of 64 paths: as many steps whatever the batch, so that sums have the same bits

    def __init__(self, chain: Chain, condition: Any) -> None:
        self.chain, self.condition = chain, condition
        self.held: list[tuple[Any, ...]] = []  # k, xi_k, c_k, and where states count KL_k and the draws
        self.room = max(1, min(64, self.most // (64 * max(1, chain.noise_shape.numel()))))
        self.found: tuple[Tensor, Tensor] | None = None

    def add(self, k: int, step: tuple[States, Noises, Noises, States], y: Any, some: Some | None) -> None:
        """A step, ``(x, xi, c, x')``, of some of the rows or all."""
        x, xi, c, after = step
        kept: list[Any] = [None, None]
        if not self.chain.of_noise:  # the step's law is at hand now
            law = (c.unsqueeze(0), [x], [after], (k,), y)
            kl = sum_steps(self.chain.path_kl(*law)) if len(x) else c.new_zeros(0)
            kept = [kl, self.chain.draws(*(part.unsqueeze(0) for part in (xi, c, after, x)))[0]]
        held = [xi, c, *kept]
        self.held.append((k, *(held if some is None else map(some.among_zeros, held))))
        if len(self.held) >= self.room:
            self._reduce()

    def _reduce(self) -> None:
        steps, *parts = zip(*self.held)
        xi, c, kls, drawn = (None if part[0] is None else torch.stack(part) for part in parts)
        assert xi is not None and c is not None
        ratio = sum_steps(self.chain.log_ratio(c, self.chain.draws(xi, c, None) if drawn is None else drawn))
        kl = sum_steps(self.chain.kl(c, None, steps, self.condition) if kls is None else kls)
        self.found = (ratio, kl) if self.found is None else (self.found[0] + ratio, self.found[1] + kl)
        self.held = []

    def result(self, zero: PerPath) -> tuple[PerPath, PerPath]:
        if self.held:
            self._reduce()
        return (zero, zero) if self.found is None else self.found


class NoiseSource(Protocol):
    """``source[k]`` is the noise of step k."""

    def __getitem__(self, k: int, /) -> Noises: ...


@full_precision()
def integrate(
    chain: Chain,
    x: States,
    noise: NoiseSource,
    shift: ShiftFunction | None = None,
    *,
    condition: Any = None,
    running_cost: RunningCost | None = None,
    keep: str = "all",
    steps: range | None = None,
) -> Paths:
    """Run a chain from states x, all its steps or the given ones (consecutive).

    Where a step's noise says which rows it moves (``Chain.changing``), model and control are asked for these alone, and
    the shift that is kept of the others is 0 (but of :class:`.shifts.AllRows`).

    The graph is kept if gradients are enabled and something requires them. Log-ratios are reduced after the loop from
    what it stored; finiteness is checked afterwards and located from the stored states.

    Raises:
        NonFiniteError: naming the quantity, the step and the number of rows.
    """
    steps = range(chain.steps) if steps is None else steps
    everything, law, begin = keep == "all", chain.reverse, x
    record = _started(chain, x, keep, running_cost is not None)
    zero = chain.times.new_zeros(x.shape[0])
    totals, reverse = Totals(zero), zero
    sums = None if everything or shift is None else _Sums(chain, condition)
    shift = once_a_step(shift) if law is not None and shift is not None else shift
    # a cost that takes all states in one call waits for them
    along = getattr(running_cost, "along", None) if everything else None
    by_itself = not getattr(shift, "all_rows", False)
    with remembering():
        for k in steps:
            xi, before, version = noise[k], x, x._version
            if running_cost is not None and along is None and chain.clock[k] >= 0:
                here = chain.while_running(x, running_cost(x, chain.times[k], condition))
                if x._version != version:
                    raise changed_in_place("running cost")
                totals.running_cost = torch.add(totals.running_cost, here, alpha=chain.step_sizes[k])
                if record.costs is not None:
                    record.costs.append(here)
            part = Some.where(chain.changing(k, x, xi)) if by_itself else None
            x, c, memo = _move(chain, k, (x, xi, condition), shift, part, sums)
            if everything and chain.memo_shape is not None:
                record.memos.append(memo)
            if law is not None:
                back, b = law.draw(k, before, x, condition), None
                if shift is not None and law.controlled:
                    b = law.shift(k, x, shift, condition)
                reverse = reverse + law.log_step(before, x, xi if c is None else xi + c, back, b)
                if everything:
                    record.back_draws.append(back)
                    record.back_shifts.append(torch.zeros_like(back) if b is None else b)
            if record.states is not None:
                record.states.append(x)
            if everything:
                record.noises.append(xi)
                record.shifts.append(xi.new_zeros(()).expand_as(xi) if c is None else c)
    if along is not None and record.states is not None and (begun := max(steps.start, chain.start)) < steps.stop:
        states = torch.stack(record.states[begun - steps.start : -1])
        record.costs = chain.while_running(states, along(states, chain.times[begun : steps.stop]))
        h = record.costs.new_tensor(chain.step_sizes[begun : steps.stop]).unsqueeze(1)
        totals.running_cost = (record.costs * h).sum(0)
    if not everything:
        totals.log_ratio, totals.kl = (zero, zero) if sums is None else sums.result(zero)
    paths = Paths(chain, steps.start, steps.stop, x, condition, totals, record)
    totals.log_reverse = None if law is None else reverse
    if not bool(torch.isfinite(x).all()) or not bool(torch.isfinite(totals.running_cost - reverse).all()):
        if record.states is None:  # the same steps again with the states kept: raises, with the step's name
            with torch.no_grad():
                options: dict[str, Any] = {"condition": condition, "running_cost": running_cost}
                integrate(chain, begin, noise, shift, keep="states", steps=steps, **options)
        raise explain_nonfinite(paths, shift, running_cost)
    if sums is not None:
        check_likelihood(paths.kl(), chain)
    return paths


def _started(chain: Chain, x: States, keep: str, costs: bool) -> Record:
    """Empty lists of what is kept of every step."""
    record = Record(states=[x] if keep != "end" else None)
    if keep == "all":
        record.noises, record.shifts, record.costs = [], [], [] if costs else None
        if chain.reverse is not None:
            record.back_draws, record.back_shifts = [], []
        if chain.memo_shape is not None:
            record.memos = []
    return record


def _move(
    chain: Chain,
    k: int,
    at: tuple[States, Noises, Any],
    shift: ShiftFunction | None,
    part: Some | None,
    sums: _Sums | None,
) -> tuple[States, Noises | None, Tensor | None]:
    """Step k from ``(x, xi, condition)``: the next states, the shift, and what the chain remembers of the step; where
    a part is given of its rows, and the others stay."""
    x, xi, y = at if part is None else map(part.of, at)
    version, c, memo, after = x._version, None, None, x
    if len(x):
        c = None if shift is None else shift(k, x, y)
        if x._version != version:
            raise changed_in_place("control")
        after = chain.step(k, x, xi, c, y)
        memo = None if sums is not None or chain.memo_shape is None else chain.memo(k, x, y)
        if x._version != version:
            raise changed_in_place(f"step {k} (drift, diffusion or model)")
    else:
        c = None if shift is None else xi
        memo = None if chain.memo_shape is None else xi.new_zeros(0, *chain.memo_shape)
    if sums is not None and c is not None:
        sums.add(k, (x, xi, c, after), y, part)
    memo = None if memo is None else memo.detach()
    if part is None:
        return after, c, memo
    c, memo = (None if v is None else part.among_zeros(v) for v in (c, memo))
    return part.put(after, at[0]), c, memo


def check_likelihood(kl: PerPath, chain: Chain) -> None:
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
        states = paths.record.states
        if states is None:
            return _nonfinite("state", None, nonfinite_rows(paths.end), chain)
        if rows := nonfinite_rows(states[0]):
            return _nonfinite("initial state", paths.first, rows, chain)
        for j, x in enumerate(states[:-1]):
            k = paths.first + j
            if running_cost is not None and chain.clock[k] >= 0:
                here = chain.while_running(x, running_cost(x, chain.times[k], paths.condition))
                rows = nonfinite_rows(here)
                if rows:
                    return _nonfinite("running cost", k, rows, chain)
            if bool(torch.isfinite(states[j + 1]).all()):
                continue
            for what, value in chain.step_parts(k, x, paths.condition):
                if not bool(torch.isfinite(value).all()):
                    rows = nonfinite_rows(value) if value.ndim and value.shape[0] == x.shape[0] else x.shape[0]
                    return _nonfinite(what, k, rows, chain, f" (largest |x| there: {float(x.abs().max()):.3g})")
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
    }.get(what, f"Check the {what} there.")
    return NonFiniteError(
        f"{what} is not finite{where}, in {rows} row{'s' if rows != 1 else ''}{more}. {remedy}",
        what=what,
        step=step,
        rows=rows,
    )
