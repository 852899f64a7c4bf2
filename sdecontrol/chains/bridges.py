"""Bridges: the reference conditioned on its ends. In closed form for affine chains, exactly; and for generative
references that forget their start, whose bridge to an end is the noising process from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..processes.laws import Dirac, Gaussian, factor
from ..shapes import NoisePaths, Noises, StatePaths, States, Trajectories
from ..tensors import is_matrix_scale, symmetric
from .base import Chain


class ChainBridge:
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

    def between(self, start: States, end: States, noise: StatePaths, steps: Sequence[int] | None = None) -> StatePaths:
        """States of all steps (or of these) given both ends, each of its own law (independent of the other steps');
        noise standard normal."""
        first, gain, shift, root = (_chosen(v, steps) for v in (self._first, self._gain, self._shift, self._root))
        return start @ first.mT + end @ gain.mT + shift.unsqueeze(1) + noise @ root.mT

    def path_given_end(
        self, start: States, end: States, noise: NoisePaths, steps: Sequence[int] | None = None
    ) -> Trajectories:
        """Whole paths of the reference given both ends, the end among their states, or these steps of them; noise
        standard normal, of all steps."""
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
        return _chosen(torch.stack([*states, end]), steps)

    def noise_given_end(
        self, states: StatePaths, end: States, condition: Any = None, steps: Sequence[int] | None = None
    ) -> NoisePaths:
        """``E[xi_k | x_k, x_K]`` at states of all steps, or of these."""
        of_state, of_end, shift = (
            _chosen(v, steps) for v in (self._noise_of_state, self._noise_of_end, self._noise_shift)
        )
        return states @ of_state.mT + end @ of_end.mT + shift.unsqueeze(1)


def _chosen(rows: Tensor, steps: Sequence[int] | None) -> Tensor:
    return rows if steps is None else rows[list(steps)]


def _conditioned(cov: Tensor, M: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``X ~ N(m, cov)`` given ``M X + c + noise = y``, the noise of covariance C: gain, keep and a root of the
    covariance, of mean ``keep m + gain (y - c)``."""
    gain = cov @ M.mT @ torch.linalg.pinv(symmetric(M @ cov @ M.mT + C), hermitian=True)
    keep = torch.eye(len(cov), dtype=cov.dtype, device=cov.device) - gain @ M
    values, vectors = torch.linalg.eigh(symmetric(keep @ cov @ keep.mT + gain @ C @ gain.mT))
    return gain, keep, vectors * values.clamp(min=0.0).sqrt()


def bridge_of(chain: Chain, start: str) -> ChainBridge | NoisingBridge:
    """What draws the middle of a path of the reference anew given its ends.

    Args:
        start: of the problem: only a memoryless generative reference has such a bridge.

    Raises:
        ValueError: nothing known does.
    """
    if start == "memoryless" and (chain.reference.schedule is not None or hasattr(chain, "noising_levels")):
        return NoisingBridge(chain)
    return ChainBridge(chain)


class NoisingBridge:
    """The same for a generative reference that forgets its start, whatever that was: the noising process from its end,
    ``x_k = m_k x_K + s_k eps``.

    That is the reference's own bridge where the model's score is exact, in continuous time (on the chain up to O(h));
    for another model what it gives has a mean that is not zero under the reference, see ``methods/forward_process.py``.
    For a ``generative_sde`` ``E[xi | x_t, x_T]`` is ``-sqrt(h) g (eps - eps^(x_t))/std``: what the score of the noising
    kernel has beyond the model's own [26], [45]. For a discrete diffusion model it is
    ``(E[x_{k+1} | x_k, x_K] - mean_k(x_k))/scale_k`` with the Gaussian posterior of its noising (DDPM's).

    Raises:
        ValueError: another reference, a controlled start, or another noise level than that of the reversal (for a
            discrete model, another eta than 1), under which state and end have another joint law.
    """

    def __init__(self, chain: Chain) -> None:
        reference = chain.reference
        discrete = getattr(chain, "noising_levels", None)
        if chain.start or (reference.schedule is None and discrete is None):
            raise ValueError(
                "the noising process is the bridge of a generative_sde or diffusion_chain without a controlled start."
            )
        if not reference.reversal:
            raise ValueError(
                "the noising process is the bridge of a generative_sde with noise_level='reverse' only, and of a "
                "diffusion_chain with eta=1: with another level state and end have another joint law."
            )
        self._chain, self._shape = chain, (-1, 1, *(1,) * chain.event_ndim)
        self._posterior: Tensor | None = None
        if discrete is not None:
            self._discrete(*discrete)
            return
        c = reference.coefficients(chain.times[:-1])
        self._mu, self._std = self._rows(c.mu), self._rows(c.std)
        gains = torch.tensor([float(chain.gain(k)) for k in range(chain.steps)], dtype=torch.float64)
        self._pull = self._rows(gains * c.level / c.std) * self._mu / self._std
        self._denoise = reference.denoiser_on_grid(chain.times)

    def _rows(self, values: Tensor) -> Tensor:
        return values.to(self._chain.times).reshape(self._shape)

    def _discrete(self, mu: Tensor, std: Tensor) -> None:
        """From ``mu`` and ``std`` of all K + 1 levels, float64: to x_K, which is a little noisy itself, and the mean of
        x_{k+1} given x_k and x_K as a sum of both."""
        m, var = mu / mu[-1], std**2 - (mu / mu[-1] * std[-1]) ** 2  # of x_k given x_K
        a = mu[:-1] / mu[1:]  # of x_k given x_{k+1}, with variance own
        own = std[:-1] ** 2 - (a * std[1:]) ** 2
        of_end, of_state = m[1:] * own / var[:-1], a * var[1:] / var[:-1]
        self._mu, self._std = self._rows(m[:-1]), self._rows(var[:-1].sqrt())
        self._posterior = torch.stack((self._rows(of_end), self._rows(of_state)))
        chain: Any = self._chain
        self._denoise = lambda k, x, y: chain.to_x0(k, x, chain.prediction_at(k, x, y))

    def between(self, start: States, end: States, noise: StatePaths, steps: Sequence[int] | None = None) -> StatePaths:
        """States of all steps (or of these) given the end, each of its own law; the start is forgotten."""
        return _chosen(self._mu, steps) * end + _chosen(self._std, steps) * noise

    def path_given_end(
        self, start: States, end: States, noise: NoisePaths, steps: Sequence[int] | None = None
    ) -> StatePaths:
        """The same of one path each, noised from step to step; ``steps`` in rising order."""
        mu, std = _chosen(self._mu, steps), _chosen(self._std, steps)
        x, states = mu[-1] * end + std[-1] * noise[-1], []
        states.append(x)
        for k in range(len(mu) - 2, -1, -1):
            a = mu[k] / mu[k + 1]
            x = a * x + (std[k] ** 2 - (a * std[k + 1]) ** 2).clamp(min=0.0).sqrt() * noise[k]
            states.append(x)
        return torch.stack(states[::-1])

    @torch.no_grad()
    def noise_given_end(
        self, states: StatePaths, end: States, condition: Any = None, steps: Sequence[int] | None = None
    ) -> NoisePaths:
        """``E[xi_k | x_k, x_K]`` at states of all steps, or of these."""
        every = range(self._chain.steps) if steps is None else steps
        return torch.stack([self.noise_at(k, x, end, condition) for k, x in zip(every, states.unbind(0))])

    def denoised(self, k: int, x: States, condition: Any = None) -> States:
        """What the pre-trained model expects the data to be at step k."""
        return self._denoise(k, x, condition)

    def noise_at(self, k: int, x: States, end: States, condition: Any = None) -> Noises:
        """The same at one step."""
        if self._posterior is None:
            return self._pull[k] * (end - self._denoise(k, x, condition))
        mean, scale = self._chain.kernel(k, x, condition)
        return (self._posterior[0, k] * end + self._posterior[1, k] * x - mean) / scale
