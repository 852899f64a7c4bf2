"""Independent formulas: the law of a whole linear-Gaussian path as one dense Gaussian, in plain linear algebra.

Nothing here knows of recursions, controls or time: a path is one long Gaussian vector, and everything that the theory
says about it is conditioning, marginalising and tilting of that vector (float64, numpy).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Affine", "Joint", "gaussian_kl", "log_density", "path_law"]

#: ``x' = M x + b + C xi``.
Affine = tuple[np.ndarray, np.ndarray, np.ndarray]


def log_density(x: np.ndarray, mean: np.ndarray, cov: np.ndarray) -> np.ndarray:
    """``log N(x; mean, cov)`` for x ``(..., n)``."""
    standard = np.linalg.solve(np.linalg.cholesky(cov), (x - mean)[..., None])[..., 0]
    return -0.5 * (standard**2).sum(-1) - 0.5 * np.linalg.slogdet(2 * np.pi * cov)[1]


def gaussian_kl(p: Joint, q: Joint) -> float:
    """``KL(p || q)``."""
    ratio = np.linalg.solve(q.cov, p.cov)
    gap = q.mean - p.mean
    return 0.5 * float(np.trace(ratio) - len(gap) + gap @ np.linalg.solve(q.cov, gap) - np.linalg.slogdet(ratio)[1])


@dataclass(frozen=True)
class Joint:
    """A Gaussian law of n blocks of size d (a path: block k is x_k)."""

    mean: np.ndarray
    cov: np.ndarray
    d: int

    @property
    def blocks(self) -> int:
        return len(self.mean) // self.d

    def _at(self, ks: Sequence[int]) -> np.ndarray:
        return np.concatenate([np.arange(self.d * (k % self.blocks), self.d * (k % self.blocks) + self.d) for k in ks])

    def of(self, *ks: int) -> Joint:
        """The law of these blocks, in this order."""
        i = self._at(ks)
        return Joint(self.mean[i], self.cov[np.ix_(i, i)], self.d)

    def regression(self, targets: Sequence[int], given: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``(M, b, Q)`` of the conditional law ``x_targets | x_given ~ N(M x_given + b, Q)``."""
        t, g = self._at(targets), self._at(given)
        M = np.linalg.solve(self.cov[np.ix_(g, g)], self.cov[np.ix_(g, t)]).T
        return M, self.mean[t] - M @ self.mean[g], self.cov[np.ix_(t, t)] - M @ self.cov[np.ix_(g, t)]

    def tilted(self, P: np.ndarray, q: np.ndarray) -> tuple[Joint, float]:
        """The law times ``exp(-x'Px/2 + q'x)``, normalised, and the log of the normalising constant.

        No covariance is inverted, so that points (covariance zero) are welcome.
        """
        m, C = self.mean, self.cov
        B = np.eye(len(m)) + C @ P
        keep, pulled = np.linalg.solve(B, m), np.linalg.solve(B, C @ q)
        sign, log_det = np.linalg.slogdet(B)
        if not (sign > 0 and np.linalg.eigvals(B).real.min() > 0):
            raise ValueError("the tilted law has no finite normalising constant.")
        log_z = -0.5 * log_det - 0.5 * m @ P @ keep + q @ keep + 0.5 * q @ pulled
        cov = np.linalg.solve(B, C)
        return Joint(keep + pulled, 0.5 * (cov + cov.T), self.d), float(log_z)

    def log_prob(self, x: np.ndarray) -> np.ndarray:
        return log_density(x, self.mean, self.cov)

    def expect_quadratic(self, P: np.ndarray, q: np.ndarray) -> float:
        """``E[-x'Px/2 + q'x]``."""
        return float(-0.5 * np.trace(P @ self.cov) - 0.5 * self.mean @ P @ self.mean + q @ self.mean)


def path_law(mean: np.ndarray, cov: np.ndarray, steps: Sequence[Affine]) -> Joint:
    """The law of ``(x_0, ..., x_K)`` for ``x_0 ~ N(mean, cov)`` and ``x_{k+1} = M_k x_k + b_k + C_k xi_k``.

    Written as one linear map of all the noise that enters.
    """
    d = len(mean)
    widths = [d, *(C.shape[1] for _, _, C in steps)]
    values, vectors = np.linalg.eigh(cov)
    maps = [np.zeros((d, sum(widths)))]
    maps[0][:, :d] = vectors * np.sqrt(np.maximum(values, 0.0))
    means, at = [np.asarray(mean, dtype=np.float64)], d
    for M, b, C in steps:
        new = M @ maps[-1]
        new[:, at : at + C.shape[1]] += C
        at += C.shape[1]
        maps.append(new)
        means.append(M @ means[-1] + b)
    whole = np.concatenate(maps)
    return Joint(np.concatenate(means), whole @ whole.T, d)
