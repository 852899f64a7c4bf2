"""Bridges: the reference conditioned on its ends. In closed form for affine chains, exactly; and for generative
references that forget their start, whose bridge to an end is the noising process from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..processes.laws import Dirac, Gaussian, factor
from ..shapes import NoisePaths, PerStep, StatePaths, States, Trajectories
from ..tensors import event_sum, is_matrix_scale, symmetric
from .base import Chain
from .masking import MaskingBridge


class GaussianBridge:
    """What the bridges of Gaussian kernels share."""

    def noise_given_end(self, states: StatePaths, end: States, condition: Any = None) -> NoisePaths:
        """``E[xi_k | x_k, x_K]`` at states of all steps."""
        raise NotImplementedError

    def misfit(self, c: NoisePaths, states: StatePaths, end: States, condition: Any = None) -> PerStep:
        """``|c_k - E[xi_k | x_k, x_K]|^2/2`` of shifts c at states of all steps: minimal in the mean at the optimum."""
        return event_sum(0.5 * (c - self.noise_given_end(states, end, condition)) ** 2, c.ndim - 2)


class ChainBridge(GaussianBridge):
    """Laws of ``x_k`` given ``(x_0, x_K)``, and of the noise ``xi_k`` given ``(x_k, x_K)``, for a chain of affine steps
    ``x_{k+1} = A x_k + b + L xi_k``; exact for the chain at every step size.

    ``E[xi_k | x_k, x_K]`` is the chain's form of Doob's h-transform: ``sqrt(h) sigma^T grad log p(x_T | x_t)`` in the
    limit (tutorial [43], [45]; for a Brownian motion ``sqrt(h) (x_T - x)/(T - t)/sigma``).

    Raises:
        ValueError: a chain whose steps are not known to be affine.
    """

    def __init__(self, chain: Chain) -> None:
        linear = chain.linear_steps
        if linear is None:
            raise ValueError(
                "bridges in closed form need a linear reference (LinearSDE, BrownianMotion, OrnsteinUhlenbeck), and a "
                f"Gaussian start where it is controlled; this one is a {type(chain.reference).__name__}. Use "
                "cross-entropy with paths='reference', which regresses on whole stored paths."
            )
        d = chain.event_shape[0]
        zero = chain.times.new_zeros(1, d)
        steps = []
        for k, matrix in enumerate(linear[0]):
            mean, scale = chain.kernel(k, zero)
            L = scale[0] if is_matrix_scale(scale, 1) else torch.diag(scale.expand(1, d)[0])
            steps.append((matrix.double(), mean[0].double(), L.double()))
        eye, none = torch.eye(d, dtype=torch.float64, device=zero.device), zero[0].double()
        # forwards: the law of x_k given x_0
        before = [(eye, none, 0 * eye)]
        for A, b, L in steps[:-1]:
            M, m, C = before[-1]
            before.append((A @ M, A @ m + b, symmetric(A @ C @ A.mT + L @ L.mT)))
        # backwards: the law of x_K given x_k
        after = [(eye, none, 0 * eye)]
        for A, b, L in reversed(steps):
            M, m, C = after[-1]
            after.append((M @ A, M @ b + m, symmetric(M @ L @ L.mT @ M.mT + C)))
        after.reverse()
        rows: list[tuple[Tensor, ...]] = []
        self._steps: list[tuple[Tensor, ...]] = []
        for k, (A, b, L) in enumerate(steps):
            M, m, C = after[k + 1]
            noise_gain = L.mT @ M.mT @ torch.linalg.pinv(symmetric(after[k][2]), hermitian=True)
            noise_root = factor(symmetric(torch.eye(L.shape[1], dtype=L.dtype, device=L.device) - noise_gain @ M @ L))
            self._steps.append(tuple(v.to(zero) for v in (A, b, L, noise_root)))
            first, shift, cov = before[k]
            to_end, end_shift, end_cov = after[k]
            gain, keep, root = _conditioned(cov, to_end, end_cov)
            rows.append(
                (
                    keep @ first,
                    gain,
                    keep @ shift - gain @ end_shift,
                    root,
                    noise_gain,
                    -noise_gain @ M @ A,
                    -noise_gain @ (M @ b + m),
                )
            )
        parts = [torch.stack([row[i] for row in rows]).to(zero) for i in range(7)]
        self._first, self._gain, self._shift, self._root, *noise_parts = parts
        self._noise_of_end, self._noise_of_state, self._noise_shift = noise_parts
        self._whole = after[0]

    def start_given_end(self, initial: Dirac | Gaussian, end: States, noise: States) -> States:
        """Draws of ``x_0`` given ``x_K`` under the reference started from ``initial``; noise standard normal."""
        mean, cov = initial.mean.double(), initial.covariance_matrix.double()
        M, m, C = self._whole
        gain, keep, root = (v.to(end) for v in _conditioned(cov, M, C))
        return keep @ mean.to(end) + (end - m.to(end)) @ gain.mT + noise @ root.mT

    def between(self, start: States, end: States, noise: StatePaths) -> StatePaths:
        """States of all steps given both ends, each of its own law (independent of the other steps'); noise standard
        normal."""
        mean = start @ self._first.mT + end @ self._gain.mT + self._shift.unsqueeze(1)
        return mean + noise @ self._root.mT

    def path_given_end(self, start: States, end: States, noise: NoisePaths) -> Trajectories:
        """Whole paths of the reference given both ends; noise standard normal."""
        x, states = start, [start]
        for k, (A, b, L, root) in enumerate(self._steps[:-1]):
            xi = (
                x @ self._noise_of_state[k].mT
                + end @ self._noise_of_end[k].mT
                + self._noise_shift[k]
                + noise[k] @ root.mT
            )
            x = x @ A.mT + b + xi @ L.mT
            states.append(x)
        return torch.stack([*states, end])

    def noise_given_end(self, states: StatePaths, end: States, condition: Any = None) -> NoisePaths:
        """``E[xi_k | x_k, x_K]`` at states of all steps."""
        return states @ self._noise_of_state.mT + end @ self._noise_of_end.mT + self._noise_shift.unsqueeze(1)


def _conditioned(cov: Tensor, M: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``X ~ N(m, cov)`` given ``M X + c + noise = y``, the noise of covariance C: gain, keep and a root of the
    covariance, of mean ``keep m + gain (y - c)``."""
    gain = cov @ M.mT @ torch.linalg.pinv(symmetric(M @ cov @ M.mT + C), hermitian=True)
    keep = torch.eye(len(cov), dtype=cov.dtype, device=cov.device) - gain @ M
    values, vectors = torch.linalg.eigh(symmetric(keep @ cov @ keep.mT + gain @ C @ gain.mT))
    return gain, keep, vectors * values.clamp(min=0.0).sqrt()


def bridge_of(chain: Chain, start: str) -> ChainBridge | NoisingBridge | MaskingBridge:
    """What draws the middle of a path of the reference anew given its ends.

    Args:
        start: of the problem: only a memoryless generative reference has such a bridge.

    Raises:
        ValueError: nothing known does.
    """
    if chain.reference.keeps_tokens:
        return MaskingBridge(chain.reference)
    if chain.reference.schedule is not None and start == "memoryless":
        return NoisingBridge(chain)
    return ChainBridge(chain)


class NoisingBridge(GaussianBridge):
    """The same for a generative reference that forgets its start: ``x_t = mu_t x_T + std_t eps`` given its end,
    whatever the start.

    Those are laws of continuous time, O(h) from the chain's. ``E[xi | x_t, x_T]`` is
    ``-sqrt(h) g (eps - eps^(x_t))/std``: what the score of the noising kernel has beyond the model's own [26], [45].

    Raises:
        ValueError: another reference, a controlled start, or another noise level than that of the reversal, under which
            state and end have another joint law.
    """

    def __init__(self, chain: Chain) -> None:
        sde = chain.reference
        if chain.start or sde.schedule is None:
            raise ValueError("the noising process is the bridge of a generative_sde without a controlled start.")
        if not sde.reversal:
            raise ValueError(
                "the noising process is the bridge of a generative_sde with noise_level='reverse' only: with another "
                "level state and end have another joint law."
            )
        c = sde.coefficients(chain.times[:-1])
        shape = lambda v: v.to(chain.times).reshape(-1, 1, *(1,) * chain.event_ndim)  # noqa: E731
        self._mu, self._std = shape(c.mu), shape(c.std)
        gains = torch.tensor([float(chain.gain(k)) for k in range(chain.steps)], dtype=torch.float64)
        self._gain = shape(gains * c.level / c.std)
        self._denoise = sde.denoiser_on_grid(chain.times)

    def between(self, start: States, end: States, noise: StatePaths) -> StatePaths:
        """States of all steps given the end, each of its own law; the start is forgotten."""
        return self._mu * end + self._std * noise

    @torch.no_grad()
    def noise_given_end(self, states: StatePaths, end: States, condition: Any = None) -> NoisePaths:
        """``E[xi_k | x_k, x_K]`` at states of all steps."""
        denoised = torch.stack([self._denoise(k, x, condition) for k, x in enumerate(states.unbind(0))])
        return self._gain * self._mu / self._std * (end - denoised)
