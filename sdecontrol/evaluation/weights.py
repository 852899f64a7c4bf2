"""Self-normalised importance weights in log space, tempered by a trust region."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Weights", "self_normalised", "warn_where_few"]

_FEW = 4.0  # effective paths below which a weighted average is hardly one
_BISECTIONS = 40


class Weights(NamedTuple):
    """Weights of paths.

    Attributes:
        weights: ``(batch,)``, of mean 1 in every group.
        exponent: the mean over groups of the exponent beta <= 1 that the trust region left (1: the whole weight).
        ess: effective sample size, a fraction; the mean over groups.
    """

    weights: Tensor
    exponent: float
    ess: float


def self_normalised(log_w: Tensor, group_size: int | None = None, trust_region: float | None = None) -> Weights:
    """``w^beta / mean(w^beta)`` from log weights ``(batch,)``.

    Args:
        group_size: normalise among so many consecutive paths (of one start or condition); None: among all.
        trust_region: the largest ``KL(weighted || unweighted)`` in nats. ``beta`` is the largest exponent <= 1 that keeps to
            it: since ``w = dQ/dP``, the tempered target ``P (dQ/dP)^beta`` is a point on the geometric path from the law P that drew
            the paths to Q. None: beta = 1.
    """
    v = log_w.detach().double()
    v = v.reshape(-1, len(v) if group_size is None else group_size)
    v = v - v.amax(1, keepdim=True)
    beta = torch.ones_like(v[:, :1])
    if trust_region is not None:
        low, high = torch.zeros_like(beta), beta
        inside = _kl(v) <= trust_region
        for _ in range(0 if bool(inside.all()) else _BISECTIONS):
            middle = 0.5 * (low + high)
            fits = _kl(middle * v) <= trust_region
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        beta = torch.where(inside, beta, low)
    shares = (beta * v).softmax(1)
    ess = float((1 / (shares.square().sum(1) * v.shape[1])).mean())
    return Weights((shares * v.shape[1]).flatten().to(log_w.dtype), float(beta.mean()), ess)


def _kl(log_w: Tensor) -> Tensor:
    """``KL(weighted || uniform)`` of each row, ``(groups, 1)``."""
    log_shares = log_w.log_softmax(1)
    return (log_shares.exp() * (log_shares + math.log(log_w.shape[1]))).sum(1, keepdim=True)


def warn_where_few(name: str, ess: float, count: int, remedy: str) -> None:
    """Warn where hardly any of ``count`` weighted paths count."""
    if ess * count < _FEW <= count:
        warnings.warn(
            f"{name}: only {ess * count:.1f} of {count} weighted paths are effective; what is learned from them is biased towards "
            f"the best of them. {remedy}",
            RuntimeWarning,
            stacklevel=3,
        )
