"""Exponential Euler schemes: the linear part and the noise exactly, the rest held over each step."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..processes.generative import Coefficients, GenerativeSDE
from ..processes.semilinear import SemilinearSDE
from ..shapes import Scale, States
from .base import AffineStep, Chain
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


_NODES = 16  # of Gauss-Legendre quadrature over each step, for noise levels that are not the reversal's


class GenerativeExponentialChain(Chain):
    """The exponential Euler scheme of a generative SDE: its linear part ``-(log mu)' x`` and all coefficients of time
    are integrated exactly, the noise prediction eps is held over each step (the stochastic form of DPM-Solver-1, Lu et
    al. 2206.00927, and of the exponential integrators of Zhang & Chen 2204.13902, for any noise level)::

        x' = Phi x + effect eps(x, t_k) + L (c + xi),  Phi = mu(s_{k+1})/mu(s_k),
        effect = int Phi w dr,  L^2 = int Phi^2 g^2 dr,  w = -(g_f^2 + g^2)/(2 std).

    For the reversal (``g = g_f``), with ``sigma = std/mu``, these are closed forms: ``effect = -2 mu' (sigma -
    sigma')``, ``L^2 = mu'^2 (sigma^2 - sigma'^2)``, primes at the step's end. A control is held as eps is: ``c =
    effect (eps^u - eps)/L``, so that the chain of a tuned model is the same scheme of that model.

    Weak order 1, whatever the coefficients: only eps is approximated. For a Gaussian model the mean has no error. The
    default of generative references (docs/tables/grids.md).
    """

    scheme = "exponential"

    def __init__(self, sde: GenerativeSDE, clock: list[float], dtype: torch.dtype, device: torch.device) -> None:
        self.reference = sde
        self.set_times(clock, dtype, device)
        self.event_shape = self.noise_shape = self.control_shape = sde.event_shape
        ends = torch.tensor(clock, dtype=torch.float64)
        at = sde.coefficients(ends)
        effect, variance = _reversal(at) if sde.reversal else _other_level(sde, ends, at)
        scale, phi = variance.sqrt(), (at.log_mu[1:] - at.log_mu[:-1]).exp()
        # eps = a x + b prediction: both parts of the mean as plain numbers
        self._x_part = (phi + effect * at.eps_of_x[:-1]).tolist()
        self._model_part = (effect * at.eps_of_prediction[:-1]).tolist()
        self._gains = (effect * at.level[:-1] / (at.eps_part[:-1] * scale)).tolist()
        self._scales = scale.to(device=device, dtype=dtype)
        self._clocks = at.clock[:-1].to(device=device, dtype=dtype)
        self._linear = list(zip(phi.tolist(), effect.tolist(), at.log_mu_slope.tolist(), at.eps_part.tolist()))

    def kernel(self, k: int, x: States, condition: Any = None) -> tuple[States, Scale]:
        prediction = self.reference.prediction_at(k, x, self._clocks[k], condition)
        return torch.add(self._x_part[k] * x, prediction, alpha=self._model_part[k]), self._scales[k]

    def affine_steps(self) -> list[AffineStep] | None:
        linear = self.reference.as_linear()
        if linear is None:
            return None
        eye, steps = torch.eye(linear.event_shape[0], dtype=torch.float64), []
        for k, (phi, effect, slope, eps_part) in enumerate(self._linear):
            A, a, _ = (torch.from_numpy(c) for c in linear.coefficients(self.clock[k]))
            # drift = slope x + eps_part eps
            matrix, shift = phi * eye + effect * (A - slope * eye) / eps_part, effect * a / eps_part
            steps.append(AffineStep(matrix, shift, float(self._scales[k]) * eye, self._gains[k] * eye))
        return steps

    def gain(self, k: int) -> float:
        return self._gains[k]


def _reversal(at: Coefficients) -> tuple[Tensor, Tensor]:
    """``effect`` and ``L^2`` of all steps, the noise being that of the time reversal."""
    sigma, mu = at.std / at.mu, at.mu[1:]
    return -2 * mu * (sigma[:-1] - sigma[1:]), mu**2 * (sigma[:-1] ** 2 - sigma[1:] ** 2)


def _other_level(sde: GenerativeSDE, ends: Tensor, at: Coefficients) -> tuple[Tensor, Tensor]:
    """The same for any noise level: the part of the probability flow as above, that of the noise by quadrature."""
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(_NODES))
    half = (ends[1:] - ends[:-1]).unsqueeze(1) / 2
    inner = sde.coefficients((ends[:-1, None] + half * (1 + nodes)).flatten())
    mu, std, level = (v.unflatten(0, (-1, _NODES)) for v in (inner.mu, inner.std, inner.level))
    phi = at.mu[1:, None] / mu
    of_noise = (half * weights * phi * level**2 / (2 * std)).sum(1)
    return _reversal(at)[0] / 2 - of_noise, (half * weights * (phi * level) ** 2).sum(1)
