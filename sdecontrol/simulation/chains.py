"""Chains of Gaussian kernels, ``x_{k+1} = mean_k(x_k) + scale_k(x_k) (c_k + xi_k)``, ``xi_k ~ N(0, I)``.

Everything that is simulated with likelihoods is written as such a chain, the control entering as a shift ``c_k`` of
the noise; log-ratios are then exact at every step size. ``EulerChain`` is Euler-Maruyama, ``TransitionChain`` the exact
transitions of a linear SDE, ``ExponentialChain`` those of the linear part of a semi-linear one, ``StretchChain`` the stretch of time before 0 that makes a start controllable, and
``JoinedChain`` one after another. Discrete diffusion models are chains of their own (``diffusion.py``).
"""

from __future__ import annotations

import math
from functools import cached_property
from itertools import pairwise
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import NoLikelihood, unknown_name
from ..processes.annealed import AnnealedLangevin
from ..processes.generative import GenerativeSDE
from ..processes.laws import Gaussian, GaussianMixture
from ..processes.linear import LinearSDE
from ..processes.sde import SDE
from ..processes.semilinear import SemilinearSDE
from ..tensors import check_tensor

__all__ = [
    "SAMPLING_SCHEMES",
    "Chain",
    "EulerChain",
    "ExponentialChain",
    "GenerativeExponentialChain",
    "JoinedChain",
    "StretchChain",
    "TransitionChain",
    "chain_of",
    "make_grid",
]


class Chain:
    """Base of the chains.

    Attributes:
        times: ``(K+1,)`` of the states, in the chain's dtype and on its device.
        clock: the same as Python floats (float64).
        event_shape: shape of one state.
        noise_shape: shape of one ``xi_k`` (and of a shift ``c_k``), the same for all steps.
        control_shape: shape of one control ``u``.
        reference: what the chain was made from.
    """

    times: Tensor
    clock: list[float]
    event_shape: torch.Size
    noise_shape: torch.Size
    control_shape: torch.Size
    reference: Any
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
    def start(self) -> int:
        """The step at which time 0 is reached: the length of the stretch of a controlled start, else 0."""
        return 0

    def decode(self, x: Tensor, condition: Any = None) -> Tensor:
        """From the last state to what rewards, samples and metrics see."""
        return x

    def forget(self) -> None:
        """Drop anything remembered from the last step."""

    def __deepcopy__(self, memo: Any) -> Chain:
        return self  # a chain is a definition: a copied control refers to the same one


class EulerChain(Chain):
    """Euler-Maruyama: ``mean = x + h b(x, t_k)``, ``scale = sqrt(h) sigma(x, t_k)``, ``c = sqrt(h) u``. Weak order 1,
    strong order 1/2 (1 for additive noise)."""

    def __init__(self, sde: SDE, clock: list[float], dtype: torch.dtype, device: torch.device) -> None:
        self.reference = sde
        self._set_times(clock, dtype, device)
        self.event_shape, self.control_shape = sde.event_shape, sde.control_shape
        self.noise_shape = sde.control_shape
        self._terms = sde.on_grid(self.times[:-1])
        self._roots = [math.sqrt(h) for h in self.step_sizes]
        self._vectorised = True  # until a drift turns out not to be
        constant = sde.constant_diffusion
        self._scales = None
        if constant is not None:
            made: dict[float, Tensor] = {}
            constant = constant.to(dtype=dtype, device=device) if constant.ndim == 0 else constant
            self._scales = [made.setdefault(root, constant * root) for root in self._roots]

    def kernel(self, k: int, x: Tensor, condition: Any = None) -> tuple[Tensor, Tensor]:
        drift, sigma = self._terms(k, x, condition)
        scale = self._scales[k] if self._scales is not None else sigma * self._roots[k]
        return torch.add(x, drift, alpha=self.step_sizes[k]), scale

    def kernels(self, states: Tensor, condition: Any = None, first: int = 0) -> tuple[Tensor, list[Tensor]]:
        if type(self.reference) is not SDE or self._scales is None or not self._vectorised:
            return super().kernels(states, condition, first)
        count, sde = states.shape[0], self.reference
        try:  # one call of the drift for all times
            drifts = torch.vmap(lambda x, t: sde.drift(x, t, condition))(states, self.times[first : first + count])
            with torch.no_grad():
                here = sde.drift(states[-1], self.times[first + count - 1], condition)
            self._vectorised = torch.allclose(drifts[-1], here, rtol=1e-4, atol=1e-6)
        except (RuntimeError, ValueError, TypeError):  # a drift that branches on its arguments, or leaves torch
            self._vectorised = False
        if not self._vectorised:
            return super().kernels(states, condition, first)
        steps = self.times.new_tensor(self.step_sizes[first : first + count]).reshape(-1, *(1,) * (states.ndim - 1))
        return torch.addcmul(states, drifts, steps), self._scales[first : first + count]

    def mean_matrix(self, k: int) -> Tensor | None:
        if not isinstance(self.reference, LinearSDE):
            return None
        A = self.reference.A_at(self.times[k]).to(self.times)
        return torch.eye(len(A), dtype=A.dtype, device=A.device) + self.step_sizes[k] * A

    def gain(self, k: int) -> float:
        return self._roots[k]

    def forget(self) -> None:
        forget = getattr(self.reference, "forget", None)
        if forget is not None:
            forget()


class TransitionChain(Chain):
    """The exact transitions of a linear SDE, the control held constant over each step.

    The noise is d-dimensional, ``scale`` the symmetric root of the transition covariance, and ``c = C u`` with
    ``scale C = int Phi sigma dr``; where m != d the inverse gives the control of minimum norm.
    """

    def __init__(self, sde: LinearSDE, clock: list[float], dtype: torch.dtype, device: torch.device) -> None:
        from ..processes.laws import factor

        self.reference = sde
        self._set_times(clock, dtype, device)
        self.event_shape, self.control_shape = sde.event_shape, sde.control_shape
        self.noise_shape = sde.event_shape
        made: dict[tuple[float, float], tuple[Tensor, ...]] = {}
        self._steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for s, t in pairwise(clock):
            key = (0.0, round(t - s, 14)) if sde.autonomous else (s, t)
            if key not in made:
                matrix, shift, cov, effect = sde._transition_and_gain(key[0], key[1] if sde.autonomous else t)
                root = factor(cov)
                made[key] = (matrix, shift, root, torch.linalg.pinv(root, hermitian=True) @ effect)
            self._steps.append(made[key])  # type: ignore[arg-type]
        self.matrices64 = self._steps
        seen: dict[int, tuple[Tensor, ...]] = {}
        move = lambda step: seen.setdefault(id(step), tuple(p.to(device=device, dtype=dtype) for p in step))  # noqa: E731
        self._cast = [move(step) for step in self._steps]

    def kernel(self, k: int, x: Tensor, condition: Any = None) -> tuple[Tensor, Tensor]:
        matrix, shift, root, _ = self._cast[k]
        return x @ matrix.mT + shift, root.unsqueeze(0)

    def mean_matrix(self, k: int) -> Tensor | None:
        return self._cast[k][0]

    def gain(self, k: int) -> Tensor:
        return self._cast[k][3]


class ExponentialChain(Chain):
    """The exponential Euler scheme of ``dX = (A X + a + n(X, t)) dt + sigma dW``: the linear part and the noise exactly, n
    held over each step (Jentzen & Kloeden 2009, "Overcoming the order barrier", eq. (3.1), in finite dimension)::

        x' = Phi x + int Phi (a + n(x, t_k)) dr + L (c + xi),   L L' = int Phi sigma sigma' Phi' dr,   c = C u.

    Weak order 1, strong order 1 (additive noise); no bound of the step by a stiff A; with n = 0 it is ``TransitionChain``.
    """

    def __init__(self, sde: SemilinearSDE, clock: list[float], dtype: torch.dtype, device: torch.device) -> None:
        self._linear = TransitionChain(sde.linear_part, clock, dtype, device)
        self.reference = sde
        self._set_times(clock, dtype, device)
        self.event_shape, self.control_shape = sde.event_shape, sde.control_shape
        self.noise_shape = sde.event_shape
        drive = (
            sde.driven_part
        )  # its "effect of a held control" is int Phi dr, what a held n(x_k, t_k) does to the mean
        made: dict[tuple[float, float], Tensor] = {}
        self._effects = []
        for s, t in pairwise(clock):
            key = (0.0, round(t - s, 14)) if drive.autonomous else (s, t)
            if key not in made:
                made[key] = drive._transition_and_gain(*key)[3].to(device=device, dtype=dtype)
            self._effects.append(made[key])
        self._clock = list(self.times)

    def kernel(self, k: int, x: Tensor, condition: Any = None) -> tuple[Tensor, Tensor]:
        mean, scale = self._linear.kernel(k, x)
        return mean + self.reference.nonlinearity(x, self._clock[k], condition) @ self._effects[k].mT, scale

    def gain(self, k: int) -> Tensor:
        return self._linear.gain(k)


_NODES = 16  # of Gauss-Legendre quadrature over each step: the coefficients are smooth, so this is exact to rounding


class GenerativeExponentialChain(Chain):
    """The exponential Euler scheme of a generative SDE: its linear part ``-(log mu)' x`` and all coefficients of time are
    integrated exactly, the noise prediction eps is held over each step (the stochastic form of DPM-Solver-1, Lu et al.
    2206.00927, and of the exponential integrators of Zhang & Chen 2204.13902, for any noise level)::

        x' = Phi x + (int Phi w dr) eps(x, t_k) + L (c + xi),  Phi = mu(s_{k+1})/mu(s_k),  w = -(g_f^2 + g^2)/(2 std).

    Weak order 1. For a Gaussian the mean has no error; that of the variance is two to four times Euler's on a uniform grid under
    the usual VP schedule, so it is for schedules whose coefficients vary fast within a step, not a better default.
    """

    def __init__(self, sde: GenerativeSDE, clock: list[float], dtype: torch.dtype, device: torch.device) -> None:
        self.reference = sde
        self._set_times(clock, dtype, device)
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

    def kernel(self, k: int, x: Tensor, condition: Any = None) -> tuple[Tensor, Tensor]:
        prediction = self.reference.prediction_at(k, x, self._clocks[k], condition)
        return torch.add(self._x_part[k] * x, prediction, alpha=self._model_part[k]), self._scales[k]

    def gain(self, k: int) -> float:
        return self._gains[k]

    def forget(self) -> None:
        self.reference.forget()


class StretchChain(Chain):
    """The stretch [-1, 0) that turns a random start into part of the chain.

    From the mean of the start's law a Brownian motion of covariance S reaches N(mean, S) at time 0 (the idea of
    ELEGANT, Uehara et al. 2402.15194). For a Gaussian mixture the same Brownian motion, conditioned to end in the
    mixture, is the Foellmer process; its drift is the closed form ``(E[X_0 | X_s = x] - x) / -s``.
    """

    def __init__(self, law: Gaussian | GaussianMixture, steps: int, dtype: torch.dtype, device: torch.device) -> None:
        self.reference = law
        self._set_times([-1.0 + k / steps for k in range(steps)] + [0.0], dtype, device)
        self.event_shape = law.event_shape
        self.noise_shape = self.control_shape = law.event_shape
        self.law = law
        self.mixture = law if isinstance(law, GaussianMixture) else None
        spread = Gaussian(law.mean, law.covariance_matrix) if isinstance(law, GaussianMixture) else law
        self.point = law.mean.to(device=device, dtype=dtype)
        self.covariance = spread.covariance_matrix if not spread.is_diagonal else spread.variance
        root = spread.scale_root.to(device=device, dtype=dtype)
        self._matrix = not spread.is_diagonal
        self._scales = [(root.unsqueeze(0) if self._matrix else root) * math.sqrt(h) for h in self.step_sizes]
        self._bridges = [self._between(t + 1.0) for t in self.clock[:-1]] if self.mixture is not None else None

    def _between(self, past: float) -> GaussianMixture:
        """The law of the Foellmer process a time ``past`` after its start (its marginal: a mixture again)."""
        assert self.mixture is not None
        mean, spread = self.mixture.mean, self.mixture.covariance_matrix
        means = mean + past * (self.mixture.means - mean)
        tiny = 1e-12 * spread.diagonal().max() * torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
        return GaussianMixture(
            self.mixture.weights, means, past**2 * self.mixture.covariances + past * (1 - past) * spread + tiny
        )

    def kernel(self, k: int, x: Tensor, condition: Any = None) -> tuple[Tensor, Tensor]:
        if self._bridges is None:
            return x, self._scales[k]
        past = self.clock[k] + 1.0
        if past == 0.0:  # everything starts in the mean, and the end's mean is the mean
            return x, self._scales[k]
        drift = self._bridges[k].score(x) @ self.covariance + (x - self.point) / past
        return torch.add(x, drift, alpha=self.step_sizes[k]), self._scales[k]

    def mean_matrix(self, k: int) -> Tensor | None:
        if self.mixture is not None or len(self.event_shape) != 1:
            return None
        return torch.eye(self.event_shape[0], dtype=self.times.dtype, device=self.times.device)


class JoinedChain(Chain):
    """One chain after another; shapes of noise and control are padded to the larger of the two.

    Padding is exact: the padded entries of a shift are zero, those of the noise move nothing.
    """

    def __init__(self, first: Chain, second: Chain) -> None:
        self.first, self.second, self.reference = first, second, second.reference
        self.event_shape, self.control_shape = second.event_shape, second.control_shape
        same = first.noise_shape == second.noise_shape
        self.noise_shape = (
            first.noise_shape if same else torch.Size((max(first.noise_shape[0], second.noise_shape[0]),))
        )
        self._padded = not same
        self._set_times(first.clock[:-1] + second.clock, second.times.dtype, second.times.device)

    @property
    def start(self) -> int:
        return self.first.steps

    def part(self, k: int) -> tuple[Chain, int]:
        """The chain that step k belongs to, and the step's number there."""
        return (self.first, k) if k < self.first.steps else (self.second, k - self.first.steps)

    def kernel(self, k: int, x: Tensor, condition: Any = None) -> tuple[Tensor, Tensor]:
        chain, j = self.part(k)
        mean, scale = chain.kernel(j, x, condition)
        missing = self.noise_shape[0] - chain.noise_shape[0]
        if missing:
            if scale.ndim < 3:
                scale = torch.diag_embed(scale.expand(chain.event_shape) if scale.ndim < 2 else scale)
                scale = scale.unsqueeze(0) if scale.ndim == 2 else scale
            scale = torch.nn.functional.pad(scale, (0, missing))
        return mean, scale

    def mean_matrix(self, k: int) -> Tensor | None:
        chain, j = self.part(k)
        return chain.mean_matrix(j)

    def gain(self, k: int) -> float | Tensor:
        chain, j = self.part(k)
        return chain.gain(j)

    def shift(self, k: int, u: Tensor) -> Tensor:
        chain, j = self.part(k)
        c = chain.shift(j, u)
        missing = self.noise_shape[0] - chain.noise_shape[0]
        return torch.nn.functional.pad(c, (0, missing)) if missing else c

    def shifts(self, u: Tensor, first: int = 0) -> Tensor:
        return torch.stack([self.shift(first + j, here) for j, here in enumerate(u.unbind(0))])

    def control(self, k: int, c: Tensor) -> Tensor:
        chain, j = self.part(k)
        return chain.control(j, c[..., : chain.noise_shape[0]] if self._padded else c)

    def decode(self, x: Tensor, condition: Any = None) -> Tensor:
        return self.second.decode(x, condition)

    def forget(self) -> None:
        self.second.forget()


def make_grid(time_steps: Any, horizon: float) -> list[float]:
    """A grid of times from a number of steps, or from an increasing sequence ``0 = t_0 < ... < t_K = horizon``.

    Uniform grids are computed point by point, never accumulated, so that K steps are exactly K.
    """
    if isinstance(time_steps, bool) or time_steps is None:
        raise TypeError(f"time_steps must be a number of steps or a grid of times, got {time_steps!r}.")
    if isinstance(time_steps, Integral):
        time_steps = int(time_steps)
        if time_steps < 1:
            raise ValueError(f"time_steps must be >= 1, got {time_steps}.")
        return [horizon * k / time_steps for k in range(time_steps)] + [horizon]
    if isinstance(time_steps, (float, str)):
        raise TypeError(f"time_steps must be an int (or a grid of times), got {time_steps!r}.")
    grid = time_steps if isinstance(time_steps, Tensor) else torch.as_tensor(list(time_steps), dtype=torch.float64)
    check_tensor("time_steps", grid.double(), shape=("K+1",), hint="a grid of times from 0 to the horizon.")
    values = [float(t) for t in grid]
    if len(values) < 2:
        raise ValueError("time_steps as a grid needs at least two times.")
    if any(b <= a for a, b in pairwise(values)):
        k = next(i for i, (a, b) in enumerate(pairwise(values)) if b <= a)
        raise ValueError(
            f"time_steps must be strictly increasing; entry {k + 1} ({values[k + 1]:g}) is not above "
            f"entry {k} ({values[k]:g})."
        )
    if abs(values[0]) > 1e-6 * horizon or abs(values[-1] - horizon) > 1e-6 * horizon:
        raise ValueError(f"time_steps must go from 0 to the horizon {horizon:g}, got {values[0]:g} to {values[-1]:g}.")
    values[0], values[-1] = 0.0, horizon
    return values


SCHEMES = ("euler", "exact", "exponential")
#: schemes of ``simulate`` that have no Gaussian kernels, and so are no chains (``solvers.py``, ``flow.py``)
SAMPLING_SCHEMES = ("milstein", "srk", "heun", "midpoint", "euler-heun", "reversible-heun", "probability-flow")


def chain_of(sde: SDE, time_steps: Any, scheme: str, dtype: torch.dtype, device: torch.device) -> Chain:
    """The chain of an SDE on a grid, by the scheme "euler", "exact" (linear references) or "exponential" (semi-linear and
    generative ones).

    Raises:
        NoLikelihood: a scheme that samples but has no Gaussian kernels. ValueError: an unknown scheme, or one that the
        reference does not have.
    """
    if scheme in SAMPLING_SCHEMES:
        raise NoLikelihood(
            f"scheme={scheme!r} has no Gaussian kernels, so no likelihood ratios, which solving, weights and exact "
            f"solutions need. Use scheme='euler' there; simulate(..., scheme={scheme!r}) samples with it."
        )
    clock = make_grid(time_steps, sde.horizon)
    if isinstance(sde, AnnealedLangevin) and scheme in ("euler", "exponential"):
        from .backward import AnnealedChain

        return AnnealedChain(sde, clock, scheme, dtype, device)
    if scheme == "euler":
        return EulerChain(sde, clock, dtype, device)
    if scheme == "exact":
        linear = sde if isinstance(sde, LinearSDE) else getattr(sde, "as_linear", lambda: None)()
        if linear is None:
            raise ValueError(
                "scheme='exact' needs a linear reference (LinearSDE, BrownianMotion, OrnsteinUhlenbeck); "
                f"{type(sde).__name__} has no exact transitions. Use scheme='euler'."
            )
        return TransitionChain(linear, clock, dtype, device)
    if scheme == "exponential":
        return _exponential(sde, clock, dtype, device)
    raise unknown_name("scheme", scheme, SCHEMES)


def _exponential(sde: SDE, clock: list[float], dtype: torch.dtype, device: torch.device) -> Chain:
    if isinstance(sde, SemilinearSDE):
        return ExponentialChain(sde, clock, dtype, device)
    if isinstance(sde, GenerativeSDE):
        return GenerativeExponentialChain(sde, clock, dtype, device)
    if isinstance(sde, LinearSDE):  # nothing is left to approximate
        return TransitionChain(sde, clock, dtype, device)
    raise ValueError(
        f"scheme='exponential' needs to know the linear part of the drift, which a {type(sde).__name__} does not say. "
        "Write it as sc.SemilinearSDE(A, nonlinearity, sigma), or use scheme='euler'."
    )
