"""A chain: a process in steps, each a law that a control may change.

Everything the package knows of a step is a handful of functions of the chain (``step``, ``draws``, ``log_ratio``,
``kl``, ``shift_at``); here with Gaussian kernels as defaults, ``x_{k+1} = mean_k(x_k) + scale_k(x_k) (c_k + xi_k)``,
``xi_k ~ N(0, I)``: the control shifts the noise by ``c_k``, and log-ratios are exact at every step size. Such a chain
writes ``kernel`` and ``gain`` alone. Others write the functions themselves: any map of the noise in the mean's place
(:mod:`.noise_driven`), or kernels on finite sets (:mod:`.categorical`). A chain may have a reverse law
(:mod:`.reverse`), and be made of segments, one after another (:mod:`.segments`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..processes.modules import Definition
from ..shapes import (
    ControlPaths,
    Controls,
    DrawPaths,
    NoisePaths,
    Noises,
    PerStep,
    Samples,
    Scale,
    StatePaths,
    States,
    Times,
)
from ..tensors import apply_scale, event_sum
from .reverse import ReverseLaw


class AffineStep(NamedTuple):
    """``x' = matrix x + shift + scale (gain u + xi)``, in float64 on the CPU."""

    matrix: Tensor
    shift: Tensor
    scale: Tensor
    gain: Tensor


class Chain(Definition):
    """Base of the chains.

    Attributes:
        times: ``(K+1,)`` of the states, in the chain's (floating-point) dtype and on its device.
        clock: the same as Python floats (float64).
        event_shape: shape of one state.
        noise_shape: shape of one ``xi_k``, always standard normal, and of a shift ``c_k``; the same for all steps.
        control_shape: shape of one control ``u``.
        reference: what the chain was made from.
        state_dtype: of the states, where it is not that of the times (tokens).
        reverse: the kernels backwards of which the target is made, where it is not made of the reference's own.
        gaussian: whether the steps are Gaussian kernels, with a mean and a scale.
        of_noise: whether a step's log-ratio and KL are functions of its noise and shift alone: states may then be None.
        memo_shape: of one row of what a step computes at its state and later questions there ask for again
            (:meth:`memo`); None: nothing.
        noising_levels: of a discrete diffusion model, mu and std of the K + 1 states under its noising process, each
            ``(K+1,)`` float64.
        scheme: what ``problem.chain(..., scheme=)`` calls its kind, of the process itself where a learned start comes
            first; "" for chains that are not made from an SDE and a grid.
    """

    times: Times
    clock: list[float]
    event_shape: torch.Size
    noise_shape: torch.Size
    control_shape: torch.Size
    reference: Any
    state_dtype: torch.dtype | None = None
    reverse: ReverseLaw | None = None
    gaussian: bool = True
    of_noise: bool = True
    memo_shape: torch.Size | None = None
    noising_levels: tuple[Tensor, Tensor] | None = None
    scheme: str = ""

    def set_times(self, clock: list[float], dtype: torch.dtype, device: torch.device) -> None:
        """Lay the grid: the times of all states."""
        self.clock = clock
        self.times = torch.tensor(clock, dtype=torch.float64).to(device=device, dtype=dtype)
        self.step_sizes = [b - a for a, b in pairwise(clock)]

    @property
    def steps(self) -> int:
        return len(self.clock) - 1

    @property
    def event_ndim(self) -> int:
        return len(self.event_shape)

    # ---------------------------------------------------------------- the step as a law

    def step(self, k: int, x: States, xi: Noises, c: Noises | None = None, condition: Any = None) -> States:
        """``x_{k+1}`` from states, noise and the control's part c; None: the reference's own step."""
        mean, scale = self.kernel(k, x, condition)
        z = xi if c is None else xi + c
        return torch.addcmul(mean, scale, z) if scale.ndim < 3 else mean + apply_scale(scale, z, self.event_ndim)

    def draws(
        self, noises: NoisePaths, shifts: NoisePaths, states: StatePaths | None, before: StatePaths | None = None
    ) -> DrawPaths:
        """What log-ratios are functions of, beside the shifts of the control in question, with the steps' leading
        dimension: ``xi + c``, the noise that would have made the step under the reference.

        Args:
            noises, shifts: of the steps. states: those that the steps led to. before: those that they left.
        """
        return noises + shifts

    def log_ratio(self, c: NoisePaths, draws: DrawPaths) -> PerStep:
        """``log p^u(x_{k+1} | x_k) - log p0(x_{k+1} | x_k)`` of a control whose shifts there are c."""
        return event_sum(c * torch.sub(draws, c, alpha=0.5), len(self.noise_shape))

    def kl(
        self,
        c: NoisePaths,
        states: StatePaths | Sequence[States] | None,
        steps: Iterable[int],
        condition: Any = None,
        other: NoisePaths | None = None,
    ) -> PerStep:
        """``KL(p^u(. | x_k) || p0(. | x_k))`` at states of the given steps, c their shifts; with the shifts of another
        control, against its kernels in the reference's place. (States in a sequence are those of a path under way,
        themselves: what the step has computed at them is at hand.)"""
        c = c if other is None else c - other
        return 0.5 * event_sum(c * c, len(self.noise_shape))

    def surprisal(self, draws: DrawPaths) -> PerStep:
        """``-log p0(x_{k+1} | x_k)`` where it is a function of the draw alone, up to a constant, else 0: with it the
        loss of a weighted likelihood is reported, which no control changes by it."""
        return event_sum(0.5 * draws**2, len(self.noise_shape))

    def shift_at(self, k: int, x: States, u: Controls, condition: Any = None) -> Noises:
        """The shift ``c_k`` that a control u makes at step k and states x."""
        gain = self.gain(k)
        return u @ gain.mT if isinstance(gain, Tensor) else u * gain

    def shifts_at(self, steps: Sequence[int], states: StatePaths, u: ControlPaths, condition: Any = None) -> NoisePaths:
        """The shifts that controls make at stored states of the given steps."""
        gains = [self.gain(k) for k in steps]
        if isinstance(gains[0], Tensor):
            return u @ torch.stack(gains).mT  # type: ignore[arg-type]
        return u * u.new_tensor(gains).reshape(-1, *(1,) * (u.ndim - 1))

    def together(self, k: int, x: States, first: Noises, second: Noises, condition: Any = None) -> Noises:
        """The shift at step k and states x of two controls together, from the shifts of each."""
        return first + second

    def tangent(self, x: Tensor, c: Tensor) -> Tensor:
        """The part of a shift that acts at x, of one step or several: all of it, but on manifolds."""
        return c

    def while_running(self, x: Tensor, values: Tensor) -> Tensor:
        """``values`` at states ``(..., *event)``, 0 where the process has stopped: as they are, but for a chain that
        stops (:mod:`.stopped`)."""
        return values

    def inside(self, x: Tensor) -> Tensor | None:
        """Whether states ``(..., *event)`` have stopped, ``(...)``; None: nothing stops this chain."""
        return None

    def changing(self, k: int, x: States, xi: Noises) -> Tensor | None:
        """Rows ``(batch,)`` that step k moves, where its noise alone says so: model and control enter it there only.
        None: all."""
        return None

    def changed(self, before: StatePaths, after: StatePaths) -> Tensor | None:
        """The same of stored states, ``(K, batch)``."""
        return None

    def path_kl(
        self,
        c: NoisePaths,
        before: StatePaths | Sequence[States] | None,
        after: StatePaths | Sequence[States],
        steps: Iterable[int],
        condition: Any = None,
    ) -> PerStep:
        """:meth:`kl` of steps that were taken, given that of their noise which no control enters: along paths of the
        control the mean is the same."""
        return self.kl(c, before, steps, condition)

    def memo(self, k: int, x: States, condition: Any = None) -> Tensor | None:
        """What the step at x has computed, ``(batch, *memo_shape)``, to be kept with stored states: inside
        ``memory.stored(chain, steps, states, memos)`` shifts and KLs there cost no second call of it."""
        return None

    def step_parts(self, k: int, x: States, condition: Any = None) -> list[tuple[str, Tensor]]:
        """What made step k from states x, by name: the first that is not finite is at fault."""
        mean, scale = self.kernel(k, x, condition)
        return [("drift", mean), ("diffusion", scale)]

    # ---------------------------------------------------------------- Gaussian kernels

    def kernel(self, k: int, x: States, condition: Any = None) -> tuple[States, Scale]:
        """Mean and scale of step k at x."""
        raise NotImplementedError

    def mean_matrix(self, k: int) -> Tensor | None:
        """The matrix ``(d, d)`` of the mean of step k where it is affine in x and known, else None."""
        return None

    @cached_property
    def linear_steps(self) -> tuple[Tensor, list[Tensor]] | None:
        """Where all means are affine with known matrices: these ``(K, d, d)``, and the scales, which then do not depend
        on x; else None."""
        known = [self.mean_matrix(k) for k in range(self.steps)]
        if any(m is None for m in known):
            return None
        with torch.no_grad():
            x = self.times.new_zeros(1, *self.event_shape)
            return torch.stack([m for m in known if m is not None]), [self.kernel(k, x)[1] for k in range(self.steps)]

    def affine_steps(self) -> list[AffineStep] | None:
        """All steps with the precision of float64, where they are known to be affine in x; else None."""
        return None

    def double(self) -> Chain:
        """The same chain in float64.

        Raises:
            TypeError: a chain that was not made from an SDE and a grid.
        """
        if not self.scheme:
            raise TypeError(f"a {type(self).__name__} has the dtype of its own model; it has no copy in float64.")
        return type(self)(self.reference, self.clock, torch.float64, self.times.device)  # type: ignore[call-arg]

    def gain(self, k: int) -> float | Tensor:
        """``c = gain u``: a number, or a ``(noise, m)`` matrix."""
        return math.sqrt(self.step_sizes[k])

    def control(self, k: int, c: Noises) -> Controls:
        """The control (of minimum norm) whose shift is c."""
        gain = self.gain(k)
        return c @ torch.linalg.pinv(gain).mT if isinstance(gain, Tensor) else c / gain

    # ---------------------------------------------------------------- times and parts

    def step_at(self, t: float) -> int:
        """The step that contains time t (matched to the grid within 1e-9 of the horizon)."""
        span = self.clock[-1] - self.clock[0]
        inside = sum(time <= t + 1e-9 * span for time in self.clock) - 1
        return min(max(inside, 0), self.steps - 1)

    @property
    def segments(self) -> tuple[Chain, ...]:
        """The chains of which this one is made, one after another: before the process there may be a learned start."""
        return (self,)

    @property
    def main(self) -> Chain:
        """The chain of the process itself, from time 0."""
        return self.segments[-1]

    @property
    def start(self) -> int:
        """The step at which time 0 is reached: the length of a learned start, else 0."""
        return self.steps - self.main.steps

    def on(self, dtype: torch.dtype, device: torch.device) -> Chain:
        """The same in the dtype and on the device of a problem."""
        return self

    def decode(self, x: States, condition: Any = None) -> Samples:
        """From the last state to what rewards, samples and metrics see."""
        return x
