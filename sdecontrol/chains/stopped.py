"""A chain that stops at the first of its states in a region: first exit and hitting."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..processes.region import Region
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
)
from ..tensors import apply_scale_transposed
from .base import Chain

#: ``-zeta(1/2)/sqrt(2 pi)``: how far, in steps' standard deviations, a Gaussian walk overshoots a boundary in the mean
OVERSHOOT = 0.5825971579390107


class StoppedChain(Chain):
    """The steps of another chain up to the first state in a region, which is kept from there on: the step from x is
    that chain's own where x is outside, and ``x' = x`` inside.

    A state inside takes no shift, so that log-ratios and KLs end with the path, for kernels of every kind. Costs of
    later steps are 0 (:meth:`while_running`). What a control would do to the step's noise is the other chain's
    business: ``kernel``, ``gain`` and the like are those of a step that is taken.
    """

    gaussian = False

    def __init__(self, inner: Chain, region: Region) -> None:
        self.inner, self.region, self.reference = inner, region, inner.reference
        self.set_times(inner.clock, inner.times.dtype, inner.times.device)
        self.event_shape, self.noise_shape, self.control_shape = (
            inner.event_shape,
            inner.noise_shape,
            inner.control_shape,
        )
        self.state_dtype, self.of_noise, self.scheme = inner.state_dtype, inner.of_noise, inner.scheme
        if region.boundary_correction:
            self._check_correction()

    def __getattr__(self, name: str) -> Any:
        # what a chain of another kind offers beside the base's questions (the letters of tokens)
        if name.startswith("__") or "inner" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.inner, name)

    def _check_correction(self) -> None:
        sizes = self.step_sizes
        if max(sizes) - min(sizes) > 1e-6 * max(sizes):
            raise ValueError("boundary_correction needs equal steps: a state inside must stay inside. Pass a number.")
        x = self.reference.probe_states(8, self.times.dtype, self.times.device)
        try:
            first, last = (self.inner.kernel(k, x)[1] for k in (0, self.steps - 1))
        except NotImplementedError:
            raise ValueError(
                f"boundary_correction needs the scale of Gaussian steps, which a {type(self.reference).__name__} has "
                "not; leave it out."
            ) from None
        if not torch.allclose(first, last, rtol=1e-4):
            raise ValueError(
                "boundary_correction needs a diffusion that does not change with time: a state inside must stay inside."
            )

    def inside(self, x: Tensor) -> Tensor:
        """Whether states ``(..., *event)`` have stopped, ``(...)``."""
        if not self.region.boundary_correction:
            return self.region.contains(x, self.event_ndim)
        flat = x.flatten(0, x.ndim - self.event_ndim - 1)
        phi, slope = self.region.slope(flat)
        with torch.no_grad():
            reach = apply_scale_transposed(self.inner.kernel(0, flat)[1], slope, self.event_ndim).flatten(1).norm(dim=1)
        return (phi <= OVERSHOOT * reach).reshape(x.shape[: x.ndim - self.event_ndim])

    def _kept(self, x: Tensor, values: Tensor, stopped: Tensor) -> Tensor:
        """``stopped`` where x is inside, else ``values``."""
        inside = self.inside(x)
        return torch.where(inside.reshape(*inside.shape, *(1,) * (values.ndim - inside.ndim)), stopped, values)

    def while_running(self, x: Tensor, values: Tensor) -> Tensor:
        return self._kept(x, values, values.new_zeros(()))

    # ---------------------------------------------------------------- the step as a law

    def step(self, k: int, x: States, xi: Noises, c: Noises | None = None, condition: Any = None) -> States:
        return self._kept(x, self.inner.step(k, x, xi, c, condition), x)

    def tangent(self, x: Tensor, c: Tensor) -> Tensor:
        return self._kept(x, self.inner.tangent(x, c), c.new_zeros(()))

    def shift_at(self, k: int, x: States, u: Controls, condition: Any = None) -> Noises:
        return self.while_running(x, self.inner.shift_at(k, x, u, condition))

    def shifts_at(self, steps: Sequence[int], states: StatePaths, u: ControlPaths, condition: Any = None) -> NoisePaths:
        return self.while_running(states, self.inner.shifts_at(steps, states, u, condition))

    def draws(
        self, noises: NoisePaths, shifts: NoisePaths, states: StatePaths | None, before: StatePaths | None = None
    ) -> DrawPaths:
        return self.inner.draws(noises, shifts, states, before)

    def log_ratio(self, c: NoisePaths, draws: DrawPaths) -> PerStep:
        return self.inner.log_ratio(c, draws)

    def kl(
        self,
        c: NoisePaths,
        states: StatePaths | Sequence[States] | None,
        steps: Iterable[int],
        condition: Any = None,
        other: NoisePaths | None = None,
    ) -> PerStep:
        return self.inner.kl(c, states, steps, condition, other)

    def surprisal(self, draws: DrawPaths) -> PerStep:
        return self.inner.surprisal(draws)

    def together(self, k: int, x: States, first: Noises, second: Noises, condition: Any = None) -> Noises:
        return self.while_running(x, self.inner.together(k, x, first, second, condition))

    def step_parts(self, k: int, x: States, condition: Any = None) -> list[tuple[str, Tensor]]:
        return self.inner.step_parts(k, x, condition)

    def kernel(self, k: int, x: States, condition: Any = None) -> tuple[States, Scale]:
        return self.inner.kernel(k, x, condition)

    def gain(self, k: int) -> float | Tensor:
        return self.inner.gain(k)

    def control(self, k: int, c: Noises) -> Controls:
        return self.inner.control(k, c)

    def double(self) -> Chain:
        return StoppedChain(self.inner.double(), self.region)

    def decode(self, x: States, condition: Any = None) -> Samples:
        return self.inner.decode(x, condition)
