"""Brownian motion and the stationary Ornstein-Uhlenbeck process on a clock whose speed falls geometrically."""

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import check_name
from ..tensors import as_float, check_tensor
from .linear import LinearSDE
from .sde import StepFunction

KINDS = ("brownian", "ou")


class TimeChanged(LinearSDE):
    """References with a known Gaussian end ``N(centre, scale^2)``, on a clock that slows down towards the end::

        "brownian":  dX = scale sqrt(b) dW,                          X_0 = centre,  int b dt = 1
        "ou":        dX = -b/2 (X - centre) dt + scale sqrt(b) dW,   stationary,    int b dt = 2 log(1/memory)

    Why a falling speed. With a Gaussian target of variance ``tau^2 scale^2`` the best mean-shift chain with the
    reference's own transitions pays ``KL = sum_k (log w_k - log w_{k+1})^2 / 4`` per dimension to leading order,
    ``w_k`` being ``tau^2`` plus the clock time that is left: at constant speed nearly all of it falls on the last
    steps. It is least for equal steps of ``log w``; with ``b(t) = rate (left(t) + resolution^2)`` they are equal for a
    target as fine as ``resolution``, and smaller for wider ones.

    The laws are closed forms, exact to rounding; ``scheme="exact"`` is the default of a chain of it, so that a
    stationary process stays stationary at every step size.

    Args:
        kind: "brownian" or "ou".
        centre: ``(d,)``. scale: 0-d or ``(d,)``, > 0, of the same dtype and on the same device.
        horizon: the end time, a mere unit: the clock's total is fixed.
        resolution: the finest relative detail, in (0, 1).
        memory: correlation of X_0 and X_T that "ou" keeps, in (0, 1).
    """

    default_scheme = "exact"

    def __init__(
        self,
        kind: str,
        centre: Tensor,
        scale: Tensor,
        horizon: float = 1.0,
        resolution: float = 0.03,
        memory: float = 0.005,
    ) -> None:
        check_name("kind", kind, KINDS)
        self.kind = kind
        self.centre = check_tensor("centre", centre, shape=("d",))
        self.scale = check_tensor("scale", scale)
        for name, value in (("resolution", resolution), ("memory", memory)):
            if not as_float(name, value, positive=True) < 1:
                raise ValueError(f"{name} must be below 1, got {value}.")
        self.resolution = float(resolution)
        self.total = 1.0 if kind == "brownian" else 2 * math.log(1 / memory)
        horizon = as_float("horizon", horizon, positive=True)
        self._fine = self.resolution**2
        self._rate = math.log((self.total + self._fine) / self._fine) / horizon
        self._reversion = 0.0 if kind == "brownian" else 0.5
        offset = self._offset_part if self._reversion else None
        super().__init__(self._drift_part, self._noise_part, offset, horizon=horizon)

    def _drift_part(self, t: Any) -> Tensor:
        eye = torch.eye(len(self.centre), dtype=self.centre.dtype, device=self.centre.device)
        return -self._reversion * self.speed(t) * eye

    def _noise_part(self, t: Any) -> Tensor:
        return self.speed(t) ** 0.5 * torch.diag(self.scale.expand(len(self.centre)))

    def _offset_part(self, t: Any) -> Tensor:
        return self._reversion * self.speed(t) * self.centre

    def left(self, t: Any) -> Any:
        """Clock time from t to the horizon."""
        return (self.total + self._fine) * _exp(-self._rate * t) - self._fine

    def speed(self, t: Any) -> Any:
        """``b(t)``, the clock's speed."""
        return self._rate * (self.total + self._fine) * _exp(-self._rate * t)

    def drift(self, x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        return torch.zeros_like(x) if not self._reversion else (self.centre - x) * (self._reversion * self.speed(t))

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        """Standard deviations, 0-d or ``(d,)``: it is diagonal."""
        return self.scale * self.speed(t) ** 0.5

    def on_grid(self, times: Tensor) -> StepFunction:
        rates = [float(self._reversion * self.speed(t)) for t in times.double()]
        sigma = [self.diffusion(self.centre, t).to(times.dtype) for t in times.double()]
        if not self._reversion:
            return lambda k, x, y: (torch.zeros_like(x), sigma[k])
        return lambda k, x, y: ((self.centre - x) * rates[k], sigma[k])

    def transition_and_gain(self, s: float, t: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d = self.event_shape[0]
        scale = self.scale.detach().double().cpu().expand(d)
        first, last = max(self.left(s), 0.0), max(self.left(t), 0.0)
        eye = torch.eye(d, dtype=torch.float64)
        if not self._reversion:
            effect = 2 / self._rate * (math.sqrt(self.speed(s)) - math.sqrt(self.speed(t)))
            return eye, eye.new_zeros(d), torch.diag(scale**2 * (first - last)), torch.diag(scale * effect)
        decay = math.exp(-0.5 * (first - last))
        variance = -math.expm1(last - first)
        # int exp(-(B_r - B_t)/2) sqrt(b_r) dr in terms of y^2 = B_r + resolution^2, B the clock time left
        near, far = (math.sqrt(0.5 * (v + self._fine)) for v in (last, first))
        near_tail, far_tail = torch.special.erfcx(torch.tensor([near, far], dtype=torch.float64)).tolist()
        effect = math.sqrt(2 * math.pi / self._rate) * (near_tail - math.exp(near**2 - far**2) * far_tail)
        centre = self.centre.detach().double().cpu()
        return decay * eye, (1 - decay) * centre, torch.diag(scale**2 * variance), torch.diag(scale * effect)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "process": self.kind, "resolution": self.resolution}


def _exp(value: Any) -> Any:
    return value.exp() if isinstance(value, Tensor) else math.exp(value)
