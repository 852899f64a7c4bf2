"""``Paths``: what the integrator returns, and the functions of it that every algorithm is made of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.shifts import shift_function, shifts_along
from ..memory import stored
from ..precision import full_precision
from ..processes.modules import evaluating, modules_in
from ..shapes import (
    ControlPaths,
    DrawPaths,
    NoisePaths,
    PerPath,
    PerStep,
    Samples,
    States,
    Times,
    Trajectories,
)
from .rows import SomeOfEach, between_ranks, by_chunks


class Target(Protocol):
    """What weights are towards: the part of a problem that paths know."""

    alpha: float

    def rewards(self, x: Samples, condition: Any = None) -> tuple[PerPath, Tensor | None]: ...

    def evaluating(self) -> contextlib.AbstractContextManager[None]: ...


def sum_steps(x: Tensor) -> Tensor:
    """Sum over the first dimension, in an order that does not depend on the size of the others: torch sums the last few
    columns in another order than the rest, so their number is made a multiple of 64."""
    flat = x.flatten(1)
    count = flat.shape[1]
    if count % 64:
        flat = torch.nn.functional.pad(flat, (0, -count % 64))
    return flat.sum(0)[:count].unflatten(0, x.shape[1:])


@dataclass
class Record:
    """What was kept of the steps: a list with an entry a step (of states one more), or the whole as one tensor; None
    where it was not kept.

    Attributes:
        states, noises, shifts: ``x_k``, ``xi_k``, ``c_k``.
        costs: ``f(x_k, t_k)`` of the steps from time 0, where there is a running cost.
        back_draws, back_shifts: of a reverse law, ``(x_k - mean'_k(x_{k+1}))/scale_k`` and ``b_k``.
        memos: what the chain's steps computed at ``x_k`` and would be asked for again (``Chain.memo``).
    """

    states: Any = None
    noises: Any = None
    shifts: Any = None
    costs: Any = None
    back_draws: Any = None
    back_shifts: Any = None
    memos: Any = None


@dataclass
class Totals:
    """Sums over the steps of each path.

    Attributes:
        running_cost: ``sum_k h_k f(x_k, t_k)``.
        log_reverse: of a reverse law, the logarithm of the target's part (``chains/reverse.py``), of the law that drew
            the paths; else None.
        log_ratio, kl: of the law that drew the paths; None where noises and shifts were kept.
    """

    running_cost: PerPath
    log_reverse: PerPath | None = None
    log_ratio: PerPath | None = None
    kl: PerPath | None = None

    def rows(self, index: Any) -> Totals:
        return self.map(lambda part: part[index])

    def map(self, function: Callable[[PerPath], PerPath]) -> Totals:
        """A function of each of them."""
        some: Any = {name: None if part is None else function(part) for name, part in vars(self).items()}
        return Totals(**some)

    @classmethod
    def joined(cls, parts: Sequence[Totals]) -> Totals:
        """Those of several batches of paths."""
        cat: Any = lambda values: None if values[0] is None else torch.cat(values)  # noqa: E731
        return cls(**{name: cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})


@dataclass(frozen=True)
class StepLaws:
    """A control at the states of stored paths, at all steps or some: all that a path loss is made of, with its
    graph.

    Attributes:
        asked: its shifts at the rows that were asked for, ``some`` of each step; None: all.
    """

    paths: Paths
    steps: Sequence[int] | None
    asked: NoisePaths
    back_shifts: NoisePaths | None = None
    some: SomeOfEach | None = None

    def _of(self, whole: Tensor) -> Tensor:
        whole = whole if self.steps is None else whole[[k - self.paths.first for k in self.steps]]
        return whole if self.some is None else self.some.of(whole)

    def _of_all(self, found: Tensor) -> Tensor:
        return found if self.some is None else self.some.among_zeros(found)

    @cached_property
    def shifts(self) -> NoisePaths:
        """``(steps, batch, *noise)``, 0 where the control was not asked."""
        return self._of_all(self.asked)

    @cached_property
    def log_ratio(self) -> PerStep:
        """``log p^u(x_{k+1} | x_k) - log p0(x_{k+1} | x_k)``."""
        return self._of_all(self.paths.chain.log_ratio(self.asked, self._of(self.paths.draws)))

    @cached_property
    def kl(self) -> PerStep:
        """``KL(p^u(. | x_k) || p0(. | x_k))``; of masked diffusion given which positions are unmasked."""
        paths = self.paths
        steps = range(paths.first, paths.last) if self.steps is None else self.steps
        before, after = self._of(paths.states[:-1]), self._of(paths.states[1:])
        with paths.remembered(before, self.steps, self.some):
            y = paths.condition if self.some is None else None
            return self._of_all(paths.chain.path_kl(self.asked, before, after, steps, y))

    @cached_property
    def log_reverse(self) -> PerStep | None:
        """``log B^u_k/B^0_k``, the control's part in the target; None where it has none."""
        law = self.paths.chain.reverse
        if law is None or self.back_shifts is None:
            return None
        return law.log_control(self._of(self.paths.back_draws), self.back_shifts)

    def less_reverse(self, values: PerStep) -> PerStep:
        """``values`` less the control's part in the target: of ``log_ratio``, all of ``-log w`` that the control
        enters."""
        return values if self.log_reverse is None else values - self.log_reverse


@dataclass(eq=False)
class Paths:
    """Simulated paths of a chain, with exact likelihood ratios against the reference.

    Attributes:
        chain: the chain that was simulated. first, last: its steps ``first .. last-1``.
        end: ``(batch, *event)``, the last states (before ``decode``).
        condition: what the paths were conditioned on, or None.
        times: ``(K+1,)``; with a controlled start they begin at -1.
        states: ``(K+1, batch, *event)``.
        noises, shifts: ``(K, batch, *noise)``, the ``xi_k``, and the ``c_k`` of the control that drew the paths; of
            masked diffusion with independent positions 0 where a step unmasks nothing, and no control was asked.
        draws: ``(K, batch, *noise)``, that of which log-ratios are functions (``xi_k + c_k`` of Gaussian kernels).
        running_cost: ``(batch,)``, ``sum_k h_k f(x_k, t_k)``.

        chunk: how many are decoded and rewarded at a time, where they were simulated in chunks; None: all.
        shared: whether all processes have all of these paths, and split the work on them.

    What was not kept (``keep="states" | "end"``) is drawn again from its seed when asked for. Rewards and weights need
    to know the target's problem: paths of ``simulate`` and of a solution do (:meth:`towards`).
    """

    chain: Chain
    first: int
    last: int
    end: States
    condition: Any
    totals: Totals
    record: Record = field(default_factory=Record)
    replay: Callable[[], Paths] | None = None
    target: Target | None = None
    chunk: int | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        self._stacks: dict[str, Tensor] = {}
        self._reward: PerPath | None = None
        self._reward_parts: Tensor | None = None

    @classmethod
    def of_states(cls, chain: Chain, states: Trajectories, draws: DrawPaths | None = None) -> Paths:
        """Paths of which only the states are known (drawn from bridges, say, step by step),
        and the draws that make them under the reference, if these are."""
        record = Record(states)
        if draws is not None:
            record = Record(states, draws, torch.zeros_like(draws))
            if chain.reverse is not None:
                pairs = enumerate(pairwise(states))
                record.back_draws = [chain.reverse.draw(k, x, after) for k, (x, after) in pairs]
        cost = chain.times.new_zeros(states.shape[1])
        return cls(chain, 0, chain.steps, states[-1], None, Totals(cost), record)

    def __repr__(self) -> str:
        kept = "all" if self.record.noises is not None else "states" if self.record.states is not None else "end"
        return f"Paths({self.steps} steps, batch={len(self)}, event={tuple(self.chain.event_shape)}, kept={kept!r})"

    def __len__(self) -> int:
        return self.end.shape[0]

    @property
    def steps(self) -> int:
        return self.last - self.first

    # ---------------------------------------------------------------- what was kept

    @cached_property
    def _whole(self) -> Paths:
        assert self.replay is not None
        return self.replay()

    def recorded(self, name: str) -> Tensor:
        """What :class:`Record` has under this name, as one tensor."""
        if name not in self._stacks:
            parts = getattr(self.record, name)
            if parts is None:
                if self.replay is None:
                    raise RuntimeError(f"these paths did not keep their {name}; simulate with keep='all'.")
                return self._whole.recorded(name)
            self._stacks[name] = parts if isinstance(parts, Tensor) else torch.stack(parts)
        return self._stacks[name]

    @property
    def times(self) -> Times:
        return self.chain.times[self.first : self.last + 1]

    @property
    def states(self) -> Trajectories:
        return self.recorded("states")

    @property
    def noises(self) -> NoisePaths:
        return self.recorded("noises")

    @property
    def shifts(self) -> NoisePaths:
        return self.recorded("shifts")

    @property
    def back_draws(self) -> NoisePaths:
        return self.recorded("back_draws")

    @cached_property
    def draws(self) -> DrawPaths:
        return self.chain.draws(self.noises, self.shifts, self.states[1:], self.states[:-1])

    @property
    def running_cost(self) -> PerPath:
        return self.totals.running_cost

    @property
    def samples(self) -> Samples:
        """The decoded ends: what rewards and metrics see."""
        with self._evaluating(), full_precision():
            return self._by_rows(lambda x, y: [self.chain.decode(x, y)], self.end)[0]

    def _by_rows(self, function: Callable[..., Sequence[Tensor]], x: Tensor) -> tuple[Tensor, ...]:
        return (between_ranks if self.shared else by_chunks)(function, self.chunk, x, self.condition)

    def _evaluating(self) -> contextlib.AbstractContextManager[None]:
        """The user's modules in evaluation mode: those of the problem, or of the reference where no problem is
        known."""
        known = self.chain.reference if self.target is None else self.target
        return known.evaluating()

    @property
    @full_precision()
    def controls(self) -> ControlPaths:
        """``u`` at every step; with a controlled start, after time 0 only."""
        start = max(self.chain.start, self.first)
        return torch.stack([self.chain.control(k, self.shifts[k - self.first]) for k in range(start, self.last)])

    @cached_property
    def stopped(self) -> Tensor:
        """``(batch,)``: whether the path has stopped, at the last of its states at the latest.

        Raises:
            ValueError: the problem has no region to stop in.
        """
        return self._stopped_at[1]

    @property
    def stopping_steps(self) -> Tensor:
        """``(batch,)``: the first step k whose ``x_k`` is in the region where the process stops; the last one where
        none is."""
        return self._stopped_at[0]

    @property
    def stopping_times(self) -> PerPath:
        """The times of :attr:`stopping_steps`."""
        return self.chain.times[self._stopped_at[0]]

    @cached_property
    def _stopped_at(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), self._evaluating():
            inside = self.chain.inside(self.states)
        if inside is None:
            raise ValueError("these paths are of a problem that never stops; pass ControlProblem(..., stop=region).")
        ends = torch.cat((inside[:-1], torch.ones_like(inside[:1])))
        return self.first + ends.int().argmax(0), inside[-1]

    def rows(self, index: Any) -> Paths:
        """Some of the paths."""
        kept = {name: self.recorded(name)[:, index] for name, parts in vars(self.record).items() if parts is not None}
        y = None if self.condition is None else self.condition[index]
        some = Paths(
            self.chain,
            self.first,
            self.last,
            self.end[index],
            y,
            self.totals.rows(index),
            Record(**kept),
            None,
            self.target,
        )
        some._reward = None if self._reward is None else self._reward[index]
        some._reward_parts = None if self._reward_parts is None else self._reward_parts[index]
        return some

    def without_steps(self) -> Paths:
        """Ends, rewards and sums over the steps alone, in the memory of these."""
        totals = replace(self.totals, kl=self.kl(), log_ratio=self.log_ratio())
        light = replace(self, totals=totals, record=Record(), replay=None)
        light._reward, light._reward_parts = self._reward, self._reward_parts
        return light

    # ---------------------------------------------------------------- the reference's law, and any control's

    @full_precision()
    def under(self, control: Any = None, steps: Sequence[int] | None = None, drew: bool = False) -> StepLaws:
        """A control at these states: its step laws, with their graph. All steps in one call of the control (a large
        one's: block by block, ``chains/blocks.py``); or the given ones.

        Args:
            control: None for the control that drew the paths.
            drew: whether this control, as it is now, drew them: its shifts are then known, and a graph that is made
                block by block costs no second evaluation.
        """
        if control is None:
            return self._under_own(steps)
        with self._evaluating(), evaluating(modules_in(control)):
            return self._under(control, steps, drew)

    def _moved(self, steps: Sequence[int] | None) -> SomeOfEach | None:
        """The rows of each step at which a control is asked for; None: all."""
        if self.condition is not None:
            return None
        if self._moved_rows is None or steps is None:
            return self._moved_rows
        rows = [k - self.first for k in steps]
        return replace(self._moved_rows, index=self._moved_rows.index[rows], real=self._moved_rows.real[rows])

    @cached_property
    def _moved_rows(self) -> SomeOfEach | None:
        return SomeOfEach.where(self.chain.changed(self.states[:-1], self.states[1:]))

    def _under_own(self, steps: Sequence[int] | None) -> StepLaws:
        law, some, c = self.chain.reverse, self._moved(steps), self.shifts
        back = self.recorded("back_shifts") if law is not None and law.controlled else None
        if steps is not None:
            rows = [k - self.first for k in steps]
            c, back = c[rows], None if back is None else back[rows]
        return StepLaws(self, steps, c if some is None else some.of(c), back, some)

    def _under(self, control: Any, steps: Sequence[int] | None, drew: bool) -> StepLaws:
        chain, law = self.chain, self.chain.reverse
        law = law if law is not None and law.controlled else None
        x, y, b, some = self.states, self.condition, None, self._moved(steps)
        known = self._under_own(steps).asked if drew else None
        at = x[:-1] if steps is None else x[[k - self.first for k in steps]]
        at = at if some is None else some.of(at)
        with self.remembered(at, steps, some):
            c = shifts_along(chain, control, at, y, self.first, steps=steps, known=known)
        if law is not None:
            shift = shift_function(chain, control)
            if steps is None:
                b = law.shifts(c, shift(chain.steps - 1, x[-1], y))
            else:
                b = torch.stack([law.shift(k, x[k + 1 - self.first], shift, y) for k in steps])
        return StepLaws(self, steps, c, b, some)

    def remembered(
        self, states: Tensor, steps: Sequence[int] | None, some: SomeOfEach | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """At these states, of all steps or the given ones, and of some rows of each or all, what the steps computed
        there is not computed again."""
        if self.record.memos is None:
            return contextlib.nullcontext()
        memos, every = self.recorded("memos"), range(self.first, self.last)
        memos = memos if steps is None else memos[[k - self.first for k in steps]]
        memos = memos if some is None else some.of(memos)
        return stored(self.chain, every if steps is None else steps, states, memos)

    @cached_property
    def _own(self) -> StepLaws:
        return self.under()

    def log_ratio(self, control: Any = None, per_step: bool = False) -> PerPath | PerStep:
        """``log dP^u/dQ0`` on these paths, ``(batch,)``, or step by step ``(K, batch)``.

        Exact at every step size, for the control that drew them and for any other at the same states.

        Args:
            control: None for the control that drew the paths; else any control ``(x, t) -> u``.
        """
        if control is None and not per_step and self.totals.log_ratio is not None:
            return self.totals.log_ratio
        steps = (self._own if control is None else self.under(control)).log_ratio
        return steps if per_step else sum_steps(steps)

    def kl(self, per_step: bool = False) -> PerPath | PerStep:
        """``sum_k KL(p^u || p0)`` of each path's steps, ``(batch,)`` or ``(K, batch)``: its mean is ``KL(P^u || Q0)``,
        with less variance than the mean of :meth:`log_ratio`. Of masked diffusion with independent positions given
        which of them each step unmasks."""
        if not per_step and self.totals.kl is not None:
            return self.totals.kl
        return self._own.kl if per_step else sum_steps(self._own.kl)

    # ---------------------------------------------------------------- the target's law

    def towards(self, target: Target, reward: PerPath | None = None, parts: Tensor | None = None) -> Paths:
        """Say which problem weights are towards, and the rewards where they are known; of several each."""
        self.target, self._reward, self._reward_parts = target, reward, parts
        return self

    @property
    def alpha(self) -> float:
        """The target's temperature."""
        if self.target is None:
            raise RuntimeError("these paths do not know a problem: say paths.towards(problem) first.")
        return self.target.alpha

    @property
    def reward(self) -> PerPath:
        """``r`` at the decoded ends, without a graph unless it was given with one."""
        if self._reward is None:
            assert self.alpha and self.target is not None
            rewards = self.target.rewards
            with torch.no_grad(), self.target.evaluating():
                known = lambda x, y: [part for part in rewards(x, y) if part is not None]  # noqa: E731
                self._reward, *parts = self._by_rows(known, self.samples)
                self._reward_parts = parts[0] if parts else None
        return self._reward

    @property
    def reward_parts(self) -> Tensor | None:
        """Of several weighted rewards each without its weight, ``(batch, rewards)``; None where there is one, or where
        only their sum was kept."""
        return self._reward_parts if self.reward is not None else None

    @property
    def cost(self) -> PerPath:
        """What the target takes from a path's reward: the running cost; with a reverse law less alpha
        times its logarithm."""
        reverse = self.totals.log_reverse
        return self.running_cost if reverse is None else self.running_cost - self.alpha * reverse

    def log_target(self) -> PerStep:
        """Of every step, the logarithm of the target's law over the reference's without a control:
        ``-h_k f_k/alpha``, or the reverse law's."""
        if self.record.noises is None and self.replay is not None:
            return self._whole.log_target()
        law, gained = self.chain.reverse, self.chain.times.new_zeros(self.steps, len(self))
        if self.record.costs is not None:
            f = self.recorded("costs")
            h = f.new_tensor(self.chain.step_sizes[self.last - len(f) : self.last]).unsqueeze(1)
            gained = torch.cat((gained[: self.steps - len(f)], f * h * (-1 / self.alpha)))
        if law is not None:
            gained = gained + law.log_step(self.states[:-1], self.states[1:], self.draws, self.back_draws, None)
        return gained

    def log_weights(self, control: Any = None, dtype: torch.dtype | None = None) -> PerPath:
        """``R/alpha - log dP^u/dQ0``: log importance weights towards the exact law; ``mean(exp(log_w))``
        is Z without bias at every step size.

        Args:
            control: None for the control that drew the paths; else any, at the same states (with its graph).
            dtype: in which the parts are put together; None: theirs.
        """
        if control is None:
            reward, cost, ratio = (
                v if dtype is None else v.to(dtype) for v in (self.reward, self.cost, self.log_ratio())
            )
            return (reward - cost) / self.alpha - ratio
        laws = self.under(control)
        total = self.reward / self.alpha + sum_steps(self.log_target())
        return total - sum_steps(laws.less_reverse(laws.log_ratio))
