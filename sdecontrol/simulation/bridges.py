"""Bridges of affine chains: the chain of the reference conditioned on its two ends, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensors import is_matrix_scale, symmetric
from .chains import Chain

__all__ = ["ChainBridge"]


class ChainBridge:
    """Laws of ``x_k`` given ``(x_0, x_K)``, and of the noise ``xi_k`` given ``(x_k, x_K)``, for a chain of affine steps
    ``x_{k+1} = A x_k + b + L xi_k``; exact for the chain at every step size.

    ``E[xi_k | x_k, x_K]`` is the chain's form of Doob's h-transform: ``sqrt(h) sigma^T grad log p(x_T | x_t)`` in the limit
    (tutorial [43], [45]; for a Brownian motion ``sqrt(h) (x_T - x)/(T - t)/sigma``).

    Raises:
        ValueError: a chain whose steps are not known to be affine.
    """

    def __init__(self, chain: Chain) -> None:
        K = chain.steps
        matrices = [chain.mean_matrix(k) for k in range(K)]
        if any(m is None for m in matrices):
            raise ValueError(
                "bridges in closed form need a linear reference (LinearSDE, BrownianMotion, OrnsteinUhlenbeck), and a Gaussian start "
                f"where it is controlled; this one is a {type(chain.reference).__name__}. Use cross-entropy with paths='reference', "
                "which regresses on whole stored paths."
            )
        d = chain.event_shape[0]
        zero = chain.times.new_zeros(1, d)
        steps = []
        for k, matrix in enumerate(matrices):
            assert matrix is not None
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
        for k, (A, b, L) in enumerate(steps):
            M, m, C = after[k + 1]
            pull = L.mT @ M.mT @ torch.linalg.pinv(symmetric(after[k][2]), hermitian=True)
            first, shift, cov = before[k]
            to_end, end_shift, end_cov = after[k]
            gain = cov @ to_end.mT @ torch.linalg.pinv(symmetric(to_end @ cov @ to_end.mT + end_cov), hermitian=True)
            keep = eye - gain @ to_end
            left = symmetric(keep @ cov @ keep.mT + gain @ end_cov @ gain.mT)
            values, vectors = torch.linalg.eigh(left)
            root = vectors * values.clamp(min=0.0).sqrt()
            rows.append(
                (keep @ first, gain, keep @ shift - gain @ end_shift, root, pull, -pull @ M @ A, -pull @ (M @ b + m))
            )
        parts = [torch.stack([row[i] for row in rows]).to(zero) for i in range(7)]
        self._first, self._gain, self._shift, self._root, self._pull, self._back, self._push = parts

    def between(self, start: Tensor, end: Tensor, noise: Tensor) -> Tensor:
        """States of all steps given both ends, ``(K, batch, d)``, each of its own law (independent of the other steps').

        Args:
            start, end: ``(batch, d)``. noise: standard normal, ``(K, batch, d)``.
        """
        mean = start @ self._first.mT + end @ self._gain.mT + self._shift.unsqueeze(1)
        return mean + noise @ self._root.mT

    def noise_given_end(self, states: Tensor, end: Tensor) -> Tensor:
        """``E[xi_k | x_k, x_K]``, ``(K, batch, noise)``, at states ``(K, batch, d)`` for the end ``(batch, d)``."""
        return states @ self._back.mT + end @ self._pull.mT + self._push.unsqueeze(1)
