"""A diffusion on the simplex in stick-breaking coordinates: probabilities of letters that move to random ones."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Beta, Distribution, constraints

from ..processes.sde import SDE, StepFunction
from ..tensors import as_float, check_count, check_tensor

_EDGE = 1e-6  # of cosines, at which a gradient is finite


class SimplexDiffusion(SDE):
    """Each of L letters is a point of the simplex, ``p_j = v_j prod_{i<j} (1 - v_i)``, and each stick v_j of V - 1 a
    Jacobi diffusion (Avdeyev et al. 2305.10699, section 3)::

        dv = speed/2 ((1 - v) - b_j v) dt + sqrt(speed v (1 - v)) dW,    b_j = V - j,

    stationary with the law Beta(1, b_j), of which the points are uniform on the simplex. The noise vanishes at the
    boundary, where a step of Euler's in v goes out. Its states here are the angles, ``v = sin(phi/2)^2``, ``(L, V-1)``:
    of constant noise ``sqrt(speed)``, and any number is an angle, so that no path, of any control, leaves the simplex.
    The drift of phi is singular at the boundary; on a grid a step has in its place the move by which the mean of v
    after the step is exact. A reward is a function of angles; ``points(x)`` gives what they stand for, ``(batch, L,
    V)``.

    Started from its stationary law and controlled, ``phi`` has the drift ``sqrt(speed) u``: with ``u = sqrt(speed)
    d/dphi log E[w | phi]`` it is the time reversal of the noising of data of the density w, ``speed`` to the power of
    one, the square of the noise.

    Moments of v beyond the mean have a bias of the order of a step: the second one +0.0025 where ``speed`` times the
    step is 0.05, +0.0006 at 0.01 (V = 4, from the vertices and from inside).

    Args:
        length, categories: L and V >= 2. speed, horizon: the correlation of start and end is ``exp(-speed horizon)`` of
            the last stick, and less of the others.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    angles = True
    coordinate_spread = math.sqrt(0.5)  # of cosines and sines

    def __init__(self, length: int, categories: int, *, speed: float = 1.0, horizon: float = 3.0) -> None:
        check_count("length", length)
        check_count("categories", categories, 2)
        self.length, self.categories = length, categories
        self.speed = as_float("speed", speed, positive=True)
        self._second = torch.arange(categories - 1, 0, -1)  # b_j
        super().__init__(self._exact_drift, torch.tensor(math.sqrt(self.speed)), shape=(length, categories - 1),
                         horizon=horizon)  # fmt: skip
        self.own_initial = StickAngles(length, self._second.to(torch.get_default_dtype()))
        self.memory = math.exp(-self.speed * self.horizon)

    def _exact_drift(self, x: Tensor, t: Tensor) -> Tensor:
        half, b = 0.5 * x, self._second.to(x)
        sine, cosine = half.sin(), half.cos()
        sine, cosine = (torch.where(z.abs() < _EDGE, _EDGE, z) for z in (sine, cosine))
        return 0.5 * self.speed * (0.5 * cosine / sine - (b - 0.5) * sine / cosine)

    def on_grid(self, times: Tensor) -> StepFunction:
        clock, steps = list(times), times.diff().tolist()

        def at(k: int, x: Tensor, y: Any) -> tuple[Tensor, Tensor]:
            if k >= len(steps):
                return self.drift(x, clock[k], y), self.diffusion(x, clock[k])
            h, b = steps[k], self._second.to(x)
            near = torch.atan2(x.sin(), x.cos())  # the same angle in (-pi, pi]
            level = 1 / (1 + b)
            mean = level + (0.5 * (1 - near.cos()) - level) * (-0.5 * self.speed * h * (1 + b)).exp()
            cosine = (1 - 2 * mean) * math.exp(0.5 * self.speed * h)  # which the noise of the step takes off again
            to = cosine.clamp(_EDGE - 1, 1 - _EDGE).acos()
            return (torch.where(near < 0, -to, to) - near) / h, self.diffusion(x, clock[k])

        return at

    def differentiated(self, t: float) -> dict[str, Any]:
        """None of a user's. A step's move jumps at phi = 0, between two states that mean the same, and what is expected
        after it does not: its gradient has no bias."""
        return {}

    # ---------------------------------------------------------------- angles and points

    def sticks(self, x: Tensor) -> Tensor:
        """v of angles, in [0, 1]."""
        return 0.5 * (1 - x.cos())

    def points(self, x: Tensor) -> Tensor:
        """The points of angles ``(batch, L, V-1)``, ``(batch, L, V)``, which sum to 1."""
        v = self.sticks(x)
        left = torch.cat((torch.ones_like(v[..., :1]), (1 - v).cumprod(-1)), -1)
        return left * torch.cat((v, torch.ones_like(v[..., :1])), -1)

    def from_points(self, points: Tensor) -> Tensor:
        """Angles of points ``(..., L, V)``; what is left of a stick of no length is 0.

        Raises:
            ValueError: points that are not on the simplex.
        """
        p = check_tensor("points", points)
        if p.shape[-2:] != (self.length, self.categories):
            raise ValueError(f"points must have shape (..., {self.length}, {self.categories}), got {tuple(p.shape)}.")
        if bool((p < 0).any()) or float((p.sum(-1) - 1).abs().max()) > 1e-4:
            raise ValueError("points must be probabilities: none negative, and of each letter they sum to 1.")
        left = p.flip(-1).cumsum(-1).flip(-1)[..., :-1]
        v = torch.where(left > 0, p[..., :-1] / left.clamp(min=1e-30), 0.0).clamp(0, 1)
        return 2 * v.sqrt().asin()


class StickAngles(Distribution):
    """The angles ``(L, V-1)`` of sticks that are independent and Beta(1, b_j): of points uniform on the simplex."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real  # type: ignore[assignment]

    def __init__(self, length: int, b: Tensor) -> None:
        self.sticks = Beta(torch.ones(length, len(b), dtype=b.dtype), b.expand(length, -1))
        super().__init__(event_shape=torch.Size((length, len(b))), validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Of the angle, ``int P(phi > z) dz`` with ``P = cos(z/2)^(2 b)``."""
        b = self.sticks.concentration0
        return math.sqrt(math.pi) * (torch.lgamma(b + 0.5) - torch.lgamma(b + 1)).exp()

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return 2 * self.sticks.sample(sample_shape).sqrt().asin()

    def log_prob(self, value: Tensor) -> Tensor:
        half = 0.5 * value
        inside = (value > 0) & (value < math.pi)
        b = self.sticks.concentration0
        each = b.log() + half.sin().abs().log() + (2 * b - 1) * half.cos().abs().log()
        return torch.where(inside, each, -math.inf).sum((-2, -1))


def stick_moments(v0: float, b: float, elapsed: float, count: int) -> np.ndarray:
    """``E[v_t^n | v_0]``, n = 0 .. count, of the Jacobi diffusion above, exactly, by the linear equations that they
    solve: ``m_n' = n/2 (n m_{n-1} - (n + b) m_n)`` at unit speed.

    Args:
        v0: in [0, 1]. b: its second parameter; the first is 1. elapsed: speed times time.
    """
    from scipy.linalg import expm

    check_count("count", count)
    if not 0 <= v0 <= 1:
        raise ValueError(f"v0 must be between 0 and 1, got {v0}.")
    n = np.arange(count + 1)
    rates = np.diag(-0.5 * n * (n + b)) + np.diag(0.5 * n[1:] ** 2, -1)
    return expm(as_float("elapsed", elapsed) * rates) @ float(v0) ** n
