"""Exponential Euler schemes: the linear part and the noise exactly, the rest held over each step."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..processes.generative import GenerativeSDE
from ..processes.semilinear import SemilinearSDE
from ..shapes import Scale, States
from .base import Chain
from .gaussian import TransitionChain


class ExponentialChain(Chain):
    """The exponential Euler scheme of ``dX = (A X + a + n(X, t)) dt + sigma dW``: the linear part and the noise
    exactly, n held over each step (Jentzen & Kloeden 2009, "Overcoming the order barrier", eq. (3.1), in finite
    dimension)::

        x' = Phi x + int Phi (a + n(x, t_k)) dr + L (c + xi),   L L' = int Phi sigma sigma' Phi' dr,   c = C u.

    Weak order 1, strong order 1 (additive noise); no bound of the step by a stiff A; with n = 0 it is
    ``TransitionChain``.
    """

    scheme = "exponential"

    def __init__(self, sde: SemilinearSDE, clock: list[float], dtype: torch.dtype, device: torch.device) -> None:
        self._linear = TransitionChain(sde.linear_part, clock, dtype, device)
        self.reference = sde
        self.set_times(clock, dtype, device)
        self.event_shape, self.control_shape = sde.event_shape, sde.control_shape
        self.noise_shape = sde.event_shape

        def effect(s: float, t: float) -> Tensor:
            """``int Phi dr``: what a held n(x_k, t_k) does to the mean."""
            return sde.driven_part.transition_and_gain(s, t)[3].to(device=device, dtype=dtype)

        self._effects = sde.driven_part.by_step(clock, effect)
        self._clock = list(self.times)

    def kernel(self, k: int, x: States, condition: Any = None) -> tuple[States, Scale]:
        mean, scale = self._linear.kernel(k, x)
        return mean + self.reference.nonlinearity(x, self._clock[k], condition) @ self._effects[k].mT, scale

    def gain(self, k: int) -> Tensor:
        return self._linear.gain(k)


_NODES = 16  # of Gauss-Legendre quadrature over each step: the coefficients are smooth, so this is exact to rounding


class GenerativeExponentialChain(Chain):
    """The exponential Euler scheme of a generative SDE: its linear part ``-(log mu)' x`` and all coefficients of time
    are integrated exactly, the noise prediction eps is held over each step (the stochastic form of DPM-Solver-1, Lu et
    al. 2206.00927, and of the exponential integrators of Zhang & Chen 2204.13902, for any noise level)::

        x' = Phi x + (int Phi w dr) eps(x, t_k) + L (c + xi),  Phi = mu(s_{k+1})/mu(s_k),  w = -(g_f^2 + g^2)/(2 std).

    Weak order 1. For a Gaussian the mean has no error; that of the variance is two to four times Euler's on a uniform
    grid under the usual VP schedule, so it is for schedules whose coefficients vary fast within a step, not a better
    default.
    """

    scheme = "exponential"

    def __init__(self, sde: GenerativeSDE, clock: list[float], dtype: torch.dtype, device: torch.device) -> None:
        self.reference = sde
        self.set_times(clock, dtype, device)
        self.event_shape = self.noise_shape = self.control_shape = sde.event_shape
        ends = torch.tensor(clock, dtype=torch.float64)
        nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(_NODES))
        half = (ends[1:] - ends[:-1]).unsqueeze(1) / 2
        inner = sde.coefficients((ends[:-1, None] + half * (1 + nodes)).flatten())
        at = sde.coefficients(ends)
        log_mu, eps_part, level = (v.unflatten(0, (-1, _NODES)) for v in (inner.log_mu, inner.eps_part, inner.level))
        phi = (at.log_mu[1:, None] - log_mu).exp()
        integral = lambda values: (half * weights * values).sum(1)  # noqa: E731
        scale = integral(phi**2 * level**2).sqrt()
        self._phi = (at.log_mu[1:] - at.log_mu[:-1]).exp().tolist()
        effect = integral(phi * eps_part)
        # eps = a x + b prediction: both parts of the mean as plain numbers
        self._x_part = (torch.tensor(self._phi, dtype=torch.float64) + effect * at.eps_of_x[:-1]).tolist()
        self._model_part = (effect * at.eps_of_prediction[:-1]).tolist()
        self._gains = (integral(phi * level) / scale).tolist()
        self._scales = scale.to(device=device, dtype=dtype)
        self._clocks = at.clock[:-1].to(device=device, dtype=dtype)

    def kernel(self, k: int, x: States, condition: Any = None) -> tuple[States, Scale]:
        prediction = self.reference.prediction_at(k, x, self._clocks[k], condition)
        return torch.add(self._x_part[k] * x, prediction, alpha=self._model_part[k]), self._scales[k]

    def gain(self, k: int) -> float:
        return self._gains[k]
