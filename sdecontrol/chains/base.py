"""Chains of Gaussian kernels, ``x_{k+1} = mean_k(x_k) + scale_k(x_k) (c_k + xi_k)``, ``xi_k ~ N(0, I)``.

Everything that is simulated with likelihoods is written as such a chain, the control entering as a shift ``c_k`` of
the noise; log-ratios are then exact at every step size. ``EulerChain`` is Euler-Maruyama, ``TransitionChain`` the exact
transitions of a linear SDE, ``ExponentialChain`` those of the linear part of a semi-linear one, ``LearnedStart`` the stretch of time before 0 that makes a start controllable, and
``SegmentedChain`` one after another. Discrete diffusion models are chains of their own (``diffusion.py``).
"""

from __future__ import annotations

import math
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["AffineStep", "Chain"]


class AffineStep(NamedTuple):
    """``x' = matrix x + shift + scale (gain u + xi)``, in float64 on the CPU."""

    matrix: Tensor
    shift: Tensor
    scale: Tensor
    gain: Tensor


class Chain:
    """Base of the chains.

    Attributes:
        times: ``(K+1,)`` of the states, in the chain's dtype and on its device.
        clock: the same as Python floats (float64).
        event_shape: shape of one state.
        noise_shape: shape of one ``xi_k`` (and of a shift ``c_k``), the same for all steps.
        control_shape: shape of one control ``u``.
        reference: what the chain was made from.
        scheme: what ``problem.chain(..., scheme=)`` calls its kind, of the process itself where a learned start comes first; "" for
            chains that are not made from an SDE and a grid.
    """

    times: Tensor
    clock: list[float]
    event_shape: torch.Size
    noise_shape: torch.Size
    control_shape: torch.Size
    reference: Any
    scheme: str = ""
    #: whether the target is made of backward kernels (``backward.py``), in which the control enters too where ``backward_control`` says so
    backward = False
    backward_control = False

    def _set_times(self, clock: list[float], dtype: torch.dtype, device: torch.device) -> None:
        self.clock = clock
        self.times = torch.tensor(clock, dtype=torch.float64).to(device=device, dtype=dtype)
        self.step_sizes = [b - a for a, b in pairwise(clock)]

    @property
    def steps(self) -> int:
        return len(self.clock) - 1

    @property
    def event_ndim(self) -> int:
        return len(self.event_shape)

    def kernel(self, k: int, x: Tensor, condition: Any = None) -> tuple[Tensor, Tensor]:
        """Mean and scale of step k at x; scales as in :func:`sdecontrol.tensors.apply_scale`."""
        raise NotImplementedError

    def backward_kernel(self, k: int, end: Tensor, condition: Any = None) -> tuple[Tensor, Tensor]:
        """Mean and scale (elementwise, the forward one) of ``x_k`` given ``x_{k+1} = end``, where there are backward kernels."""
        raise NotImplementedError

    def log_origin(self, x: Tensor) -> Tensor:
        """Log density of the law that the reference's chain starts from, up to a constant, ``(..., batch)``; with backward kernels."""
        raise NotImplementedError

    def kernels(self, states: Tensor, condition: Any = None, first: int = 0) -> tuple[Tensor, list[Tensor]]:
        """Means ``(K, batch, *event)`` and scales of steps ``first, first+1, ...`` at stored states ``(K, batch, *event)``."""
        pairs = [self.kernel(first + j, x, condition) for j, x in enumerate(states.unbind(0))]
        return torch.stack([mean for mean, _ in pairs]), [scale for _, scale in pairs]

    def mean_matrix(self, k: int) -> Tensor | None:
        """The matrix ``(d, d)`` of the mean of step k where it is affine in x and known, else None."""
        return None

    @cached_property
    def linear_steps(self) -> tuple[Tensor, list[Tensor]] | None:
        """Where all means are affine with known matrices: these ``(K, d, d)``, and the scales, which then do not depend on x; else None."""
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

    def shift(self, k: int, u: Tensor) -> Tensor:
        """The shift ``c_k`` that a control u makes at step k."""
        gain = self.gain(k)
        return u @ gain.mT if isinstance(gain, Tensor) else u * gain

    def shifts(self, u: Tensor, first: int = 0) -> Tensor:
        """The shifts ``(K, batch, *noise)`` that controls ``(K, batch, *control)`` make at steps ``first, first+1, ...``."""
        gains = [self.gain(first + j) for j in range(len(u))]
        if isinstance(gains[0], Tensor):
            return u @ torch.stack(gains).mT  # type: ignore[arg-type]
        return u * u.new_tensor(gains).reshape(-1, *(1,) * (u.ndim - 1))

    def control(self, k: int, c: Tensor) -> Tensor:
        """The control (of minimum norm) whose shift is c."""
        gain = self.gain(k)
        return c @ torch.linalg.pinv(gain).mT if isinstance(gain, Tensor) else c / gain

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

    def decode(self, x: Tensor, condition: Any = None) -> Tensor:
        """From the last state to what rewards, samples and metrics see."""
        return x

    def __deepcopy__(self, memo: Any) -> Chain:
        return self  # a chain is a definition: a copied control refers to the same one
