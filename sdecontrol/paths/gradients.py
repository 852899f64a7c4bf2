"""Gradients of a path cost through the simulation: full graph, checkpointed, discrete adjoint, truncated.

The cost is ``mean over paths of [ terminal(x_K) + sum_k ( h_k f(x_k)/alpha + KL_k ) ]``, ``|c_k|^2/2`` the KL of a
Gaussian step (less the logarithm of the target's part, where the chain has a reverse law). The first three modes give
the same gradient to rounding:

* ``full``: ordinary backpropagation; memory grows with the number of steps.
* ``adjoint``: the exact adjoint of the chain. The forward pass runs without a graph and stores states; the backward
  pass takes the vector-Jacobian products of a step, with the noise drawn again from its seed. Memory: the states, plus
  one step's graph, or that of a part of the paths where it is large; of up to 16 steps at a time where that is small
  (one at a time costs a tenth more in small networks).
* ``checkpoint``: the same with segments of sqrt(K) steps: memory of sqrt(K) states and of sqrt(K) steps' graph.
* an integer K: through the last K steps only (DRaFT-K, Clark et al. 2309.17400): a biased gradient.
* ``random``: ``adjoint`` that goes back a random number of segments, uniform from 1 to all S of them (AlignProp,
  Prabhudesai et al. 2310.03739, draws the number of last steps so), each weighted by 1 over the probability that it is
  reached (Tallec & Ollivier 1705.08209): the segment that is j-th from the end by S/(S - j + 1). Unbiased; half the
  backward pass on average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..chains.base import Chain
from ..chains.blocks import LEAST, bytes_per_row, parts_of, room_for
from ..chains.shifts import ShiftFunction, shift_function
from ..memory import once_a_step, remembering
from ..processes.reference import Reference
from ..shapes import Noises, PerPath, SomeStates, States
from .integrator import NoiseSource, RunningCost, check_likelihood, integrate
from .paths import Paths

GRADIENT_MODES = ("full", "checkpoint", "adjoint", "random")

_ADJOINT_STEPS = 16
_LEAST_SEGMENTS = 8  # in mode "random"


@dataclass(frozen=True)
class Objective:
    """What a path costs beside the KL of its steps.

    Attributes:
        terminal: a function of ``x_K``, differentiable. running_cost: f, or None. alpha: by which it is divided.
        condition: ``(batch, ...)`` or None. weight: of the mean over these paths in the whole gradient.
        seen: rows of which the states of all steps are returned; None: of none.
    """

    terminal: Callable[[States], PerPath]
    running_cost: RunningCost | None = None
    alpha: float = 1.0
    condition: Any = None
    weight: float = 1.0
    seen: slice | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Of :func:`integrate`."""
        return {"condition": self.condition, "running_cost": self.running_cost}


@dataclass(frozen=True)
class PathCost:
    """Detached parts of the cost of each path: ``cost`` is the running cost, less alpha times the
    logarithm of a reverse law; the last states; ``log P^u/Q0`` where it is known; and the states of all steps of the
    paths that were asked for, ``(K, rows, *event)``, where they are at hand."""

    terminal: PerPath
    cost: PerPath
    kl: PerPath
    end: States
    log_ratio: PerPath | None = None
    states: SomeStates | None = None


@dataclass(frozen=True)
class _SomeNoise:
    whole: NoiseSource
    rows: slice

    def __getitem__(self, k: int) -> Noises:
        return self.whole[k][self.rows]


@dataclass(frozen=True)
class _Setting:
    chain: Chain
    noise: NoiseSource
    control: Any
    objective: Objective
    parameters: Sequence[Tensor]

    def shift(self, tables: Sequence[Any] | None = None) -> ShiftFunction:
        return shift_function(self.chain, self.control, tables or None)

    def some(self, rows: slice) -> _Setting:
        """The same of some of the paths."""
        y = self.objective.condition
        objective = replace(self.objective, condition=None if y is None else y[rows])
        return replace(self, noise=_SomeNoise(self.noise, rows), objective=objective)

    @property
    def keep(self) -> str:
        """What :func:`integrate` is to keep where no graph is wanted."""
        return "end" if self.objective.seen is None else "states"

    def visited(self, paths: Paths) -> list[States]:
        """The states from which the steps of these paths were taken, of the rows that are asked for."""
        return (
            [] if self.objective.seen is None else [x.detach()[self.objective.seen] for x in paths.record.states[:-1]]
        )

    def spent(self, paths: Paths) -> PerPath:
        reverse = paths.totals.log_reverse
        return paths.running_cost if reverse is None else paths.running_cost - self.objective.alpha * reverse


def backpropagate(
    chain: Chain,
    control: Any,
    x0: States,
    noise: NoiseSource,
    objective: Objective,
    *,
    parameters: Sequence[Tensor],
    mode: str | int = "full",
    truncation: float = 1.0,
) -> PathCost:
    """Add ``weight`` times the gradient of the mean path cost to ``parameters``' ``.grad``, and to nothing else's.

    Args:
        mode: "full", "checkpoint", "adjoint", "random", or a number of last steps.
        truncation: for "random": a uniform random number in [0, 1), the part of the segments that is visited.
    """
    setting = _Setting(chain, noise, control, objective, list(parameters))
    if mode == "checkpoint":
        return _by_segments(setting, x0, math.isqrt(chain.steps))
    if mode in ("adjoint", "random"):
        rows = _rows_at_once(setting, x0)
        size = max(1, min(_ADJOINT_STEPS, rows // len(x0)))
        if mode == "random":
            return _by_segments(setting, x0, max(1, min(size, chain.steps // _LEAST_SEGMENTS)), truncation)
        return _by_segments(setting, x0, size, rows=rows)
    return _full(setting, x0, chain.steps if mode == "full" else min(int(mode), chain.steps))


def _full(setting: _Setting, x0: States, last_steps: int) -> PathCost:
    chain, objective, cut = setting.chain, setting.objective, setting.chain.steps - last_steps
    x, early_cost, early_kl, ratio = x0, *(chain.times.new_zeros(len(x0)) for _ in range(3))
    states: list[States] = []
    if cut:
        with torch.no_grad():
            early = integrate(
                chain, x0, setting.noise, setting.shift(), keep=setting.keep, steps=range(cut), **objective.options
            )
        states += setting.visited(early)
        x, early_cost, early_kl, ratio = early.end, setting.spent(early), early.kl(), early.log_ratio()
    paths = integrate(chain, x, setting.noise, setting.shift(), steps=range(cut, chain.steps), **objective.options)
    terminal, cost, kl = objective.terminal(paths.end), setting.spent(paths), paths.kl()
    check_likelihood(kl, chain)
    loss = objective.weight * (terminal + cost / objective.alpha + kl).mean()
    torch.autograd.backward(loss, inputs=list(setting.parameters))
    states += setting.visited(paths)
    with torch.no_grad():
        ratio = ratio + paths.log_ratio()
    end = paths.end.detach()
    spent, kls = (early_cost + cost).detach(), (early_kl + kl).detach()
    return PathCost(terminal.detach(), spent, kls, end, ratio.detach(), torch.stack(states) if states else None)


def _rows_at_once(setting: _Setting, x0: States) -> int:
    """How many rows' graph of a step is small enough to be held."""
    chain, control, y = setting.chain, setting.control, setting.objective.condition
    if not isinstance(control, nn.Module) or len(x0) < LEAST:
        return len(x0) * _ADJOINT_STEPS
    k, shift = chain.start, setting.shift()  # of the process itself, after the learned start
    # a learned start alone has no process: its reference is the law that it leads to
    owners = chain.reference.modules() if isinstance(chain.reference, Reference) else []

    def step(rows: int) -> States:
        x = x0[:rows].clone().requires_grad_(True)
        some = None if y is None else y[:rows]
        return chain.step(k, x, setting.noise[k][:rows], shift(k, x, some), some)

    per_row = bytes_per_row(control, "step", step, owners)
    return max(1, int(room_for(x0.device) / max(per_row, 1.0)))


def _by_segments(
    setting: _Setting, x0: States, size: int, truncation: float | None = None, rows: int | None = None
) -> PathCost:
    """Forward without a graph, storing the state at the start of each segment of ``size`` steps; backward one segment
    at a time (of ``rows`` paths at a time, where that is less than all), recomputed with its graph: the adjoint
    ``a = d cost / d x`` is carried from segment to segment.

    With ``truncation`` uniform in [0, 1) only the last ``1 + floor(truncation S)`` of the S segments are visited, each
    weighted by 1 over its probability; since all is linear in the adjoint, the weight is carried with it."""
    chain, control = setting.chain, setting.control
    # what depends on time alone is computed once: each row of it is a leaf, so that going back one segment costs that
    # segment's rows and not the whole tables; their gradient is passed on at the end
    tables = tuple(control.tables(chain)) if hasattr(control, "tables") else ()
    firsts, starts = range(0, chain.steps, size), [x0]
    states: list[States] = []
    cost = kl = ratio = chain.times.new_zeros(x0.shape[0])
    with torch.no_grad():
        shift, options = setting.shift([table.detach() for table in tables]), setting.objective.options
        for first in firsts:
            steps = range(first, min(first + size, chain.steps))
            part = integrate(chain, starts[-1], setting.noise, shift, keep=setting.keep, steps=steps, **options)
            starts.append(part.end)
            states += setting.visited(part)
            cost, kl, ratio = cost + setting.spent(part), kl + part.kl(), ratio + part.log_ratio()
    end = starts.pop().requires_grad_(True)
    terminal = setting.objective.terminal(end)
    scale = setting.objective.weight / x0.shape[0]
    adjoint = torch.autograd.grad(terminal.sum() * scale, end)[0]
    leaves = [[row.detach().requires_grad_(table.requires_grad) for row in table] for table in tables]
    wanted = [row for rows in leaves for row in rows if row.requires_grad]
    shift = setting.shift(leaves)
    visited = len(firsts) if truncation is None else 1 + int(truncation * len(firsts))
    for done, first in enumerate(firsts[::-1][:visited]):
        if truncation is not None and done:  # probability (S - done)/S, after (S - done + 1)/S
            grown = (len(firsts) - done + 1) / (len(firsts) - done)
            adjoint, scale = adjoint * grown, scale * grown
        whole, steps, slope = starts.pop().detach(), range(first, min(first + size, chain.steps)), []
        for part in parts_of(len(x0), rows or len(x0)):
            start, some = whole[part].requires_grad_(True), setting.some(part)
            with remembering():
                x, costs, slopes = _recompute(some, shift, start, steps, scale)
            torch.autograd.backward([x, *costs], [adjoint[part], *slopes], inputs=[start, *wanted, *setting.parameters])
            slope.append(start.grad if start.grad is not None else torch.zeros_like(start))
        adjoint = slope[0] if len(slope) == 1 else torch.cat(slope)
    reached = [(t, rows) for t, rows in zip(tables, leaves) if any(row.grad is not None for row in rows)]
    if reached:
        slopes = [torch.stack([torch.zeros_like(r) if r.grad is None else r.grad for r in rows]) for _, rows in reached]
        torch.autograd.backward([table for table, _ in reached], slopes, inputs=list(setting.parameters))
    return PathCost(terminal.detach(), cost, kl, end.detach(), ratio, torch.stack(states) if states else None)


def _recompute(
    setting: _Setting, shift: ShiftFunction, x: States, steps: range, scale: float
) -> tuple[States, list[Tensor], list[Tensor]]:
    """The last state of a segment with its graph, and what else the cost depends on there (KLs, running costs, a
    reverse law) with the cost's derivative by each."""
    chain, objective, law = setting.chain, setting.objective, setting.chain.reverse
    costs: list[Tensor] = []
    slopes: list[Tensor] = []
    shifts, states = [], []

    def add(value: Tensor, slope: float) -> None:
        if value.requires_grad:
            costs.append(value)
            slopes.append(torch.full_like(value, slope))

    shift = once_a_step(shift) if law is not None else shift
    for k in steps:
        if objective.running_cost is not None and chain.clock[k] >= 0:
            f = objective.running_cost(x, chain.times[k], objective.condition)
            add(f, scale * chain.step_sizes[k] / objective.alpha)
        before, xi, c = x, setting.noise[k], shift(k, x, objective.condition)
        x = chain.step(k, x, xi, c, objective.condition)
        if law is not None:
            back = law.draw(k, before, x, objective.condition)
            b = law.shift(k, x, shift, objective.condition) if law.controlled else None
            add(law.log_step(before, x, xi + c, back, b), -scale)
        shifts.append(c)
        states.append(before)
    add(
        chain.kl(torch.stack(shifts), None if chain.of_noise else torch.stack(states), steps, objective.condition),
        scale,
    )
    return x, costs, slopes
