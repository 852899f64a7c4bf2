"""Bridges: the reference conditioned on its ends. In closed form for affine chains, exactly; of generative references
that forget their start the noising process (``noising.py``), of masked diffusion masking (``masking.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..processes.laws import Dirac, Gaussian, factor
from ..shapes import NoisePaths, StatePaths, States, Trajectories
from ..tensors import is_matrix_scale, symmetric
from .base import Chain
from .masking import MaskingBridge
from .noising import GaussianBridge, NoisingBridge, at_steps


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

    def between(self, start: States, end: States, noise: StatePaths, steps: Sequence[int] | None = None) -> StatePaths:
        """States of all steps (or of these) given both ends, each of its own law (independent of the other steps');
        noise standard normal."""
        first, gain, shift, root = (at_steps(v, steps) for v in (self._first, self._gain, self._shift, self._root))
        return start @ first.mT + end @ gain.mT + shift.unsqueeze(1) + noise @ root.mT

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

    def noise_given_end(
        self, states: StatePaths, end: States, condition: Any = None, steps: Sequence[int] | None = None
    ) -> NoisePaths:
        of_state, of_end, shift = (
            at_steps(v, steps) for v in (self._noise_of_state, self._noise_of_end, self._noise_shift)
        )
        return states @ of_state.mT + end @ of_end.mT + shift.unsqueeze(1)


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
    if start == "memoryless" and (chain.reference.schedule is not None or chain.noising_levels is not None):
        return NoisingBridge(chain)
    return ChainBridge(chain)
