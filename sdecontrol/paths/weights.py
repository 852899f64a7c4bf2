"""Self-normalised importance weights in log space, tempered by a trust region. Of a batch that is split between
processes all functions take and give the own rows, and look at all of them."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import ranks
from ..errors import NonFiniteError, warn
from ..shapes import PerPath

_FEW = 4.0  # effective paths below which a weighted average is hardly one
_BISECTIONS = 40


def effective_number(log_w: Tensor, dim: int = 0) -> Tensor:
    """``(sum w)^2 / sum w^2`` along a dimension, from log weights: their effective sample size."""
    return (2 * log_w.logsumexp(dim) - (2 * log_w).logsumexp(dim)).exp()


def effective_fraction(shares: Tensor, dim: int = 0) -> Tensor:
    """The same from weights that sum to 1, as a fraction of how many they are."""
    return 1 / (shares.square().sum(dim) * shares.shape[dim])


class Weights(NamedTuple):
    """Weights of paths.

    Attributes:
        weights: of mean 1 in every group.
        exponent: the mean over groups of the exponent beta <= 1 that the trust region left (1: the whole weight).
        ess: effective sample size, a fraction; the mean over groups.
    """

    weights: PerPath
    exponent: float
    ess: float


def self_normalised(log_w: PerPath, group_size: int | None = None, trust_region: float | None = None) -> Weights:
    """``w^beta / mean(w^beta)`` from log weights.

    Args:
        group_size: normalise among so many consecutive paths (of one start or condition); None: among all.
        trust_region: the largest ``KL(weighted || unweighted)`` in nats. ``beta`` is the largest exponent <= 1 that
            keeps to it: since ``w = dQ/dP``, the tempered target ``P (dQ/dP)^beta`` is a point on the geometric path
            from the law P that drew
            the paths to Q. None: beta = 1.
    """
    v = ranks.whole(log_w.detach().double())
    v = v.reshape(-1, len(v) if group_size is None else group_size)
    top = v.amax(1, keepdim=True)
    if bool((top == -math.inf).any()):
        raise NonFiniteError(
            f"none of {v.shape[1]} weighted paths has a weight above 0: the reward is -inf at all of them. Use a "
            "larger batch, or methods that find where it is a number (tempered-smc, particle-matching).",
            what="weights",
            rows=v.shape[1],
        )
    v = v - top
    beta = torch.ones_like(v[:, :1])
    if trust_region is not None:  # hundreds of tiny operations: numpy's are cheaper
        beta = torch.from_numpy(_exponents(v.cpu().numpy(), trust_region)).to(v.device)
    shares = tempered(v, beta).softmax(1)
    ess = float(effective_fraction(shares, 1).mean())
    return Weights(ranks.own((shares * v.shape[1]).flatten().to(log_w.dtype)), float(beta.mean()), ess)


def tempered(log_w: Tensor, exponent: float | Tensor) -> Tensor:
    """``exponent * log_w``; -inf where a weight is 0, whatever the exponent."""
    counts = log_w > -math.inf
    return torch.where(counts, exponent * torch.where(counts, log_w, 0.0), -math.inf)


def largest_exponent(log_w: PerPath, group_size: int | None, trust_region: float) -> float:
    """The largest ``beta <= 1`` for which ``KL(w^beta weighted || unweighted)``, the mean over the groups, is at most
    ``trust_region``: one for all of them, where :func:`self_normalised` has one for each."""
    v = ranks.whole(log_w.detach().double()).cpu().numpy()
    v = v.reshape(-1, len(v) if group_size is None else group_size)
    return float(_exponents(v - v.max(1, keepdims=True), trust_region, together=True)[0, 0])


def _exponents(v: np.ndarray, most: float, together: bool = False) -> np.ndarray:
    """The largest ``beta <= 1`` of each row with ``KL(softmax(beta v) || uniform) <= most``, ``(groups, 1)``, by
    bisection; rows of v have maximum 0. ``together``: of all rows, by their mean KL."""
    kl = (lambda v, beta: np.full_like(beta, _kl(v, beta).mean())) if together else _kl
    low, high = np.zeros((len(v), 1)), np.ones((len(v), 1))
    inside = kl(v, high) <= most
    for _ in range(0 if inside.all() else _BISECTIONS):
        middle = 0.5 * (low + high)
        fits = kl(v, middle) <= most
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    return np.where(inside, 1.0, low)


def _kl(v: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """``KL(softmax(beta v) || uniform)`` of each row, ``(groups, 1)``."""
    powers = np.where(v > -np.inf, beta * np.where(v > -np.inf, v, 0.0), -np.inf)
    weights = np.exp(powers)
    total = weights.sum(1, keepdims=True)
    # where v is -inf the weight is 0, and 0 log 0 too
    mean = (weights * np.where(weights > 0, powers, 0.0)).sum(1, keepdims=True) / total
    return mean - np.log(total / v.shape[1])


def warn_where_few(name: str, ess: float, count: int, remedy: str) -> None:
    """Warn where hardly any of ``count`` weighted paths count."""
    if ess * count < _FEW <= count:
        warn(
            f"{name}: only {ess * count:.1f} of {count} weighted paths are effective; what is learned from them is "
            f"biased towards the best of them. {remedy}",
            RuntimeWarning,
            stacklevel=3,
        )


def leave_one_out(values: Tensor, group_size: int | None = None) -> Tensor:
    """``values`` ``(..., batch)`` less the mean of the others of their group (consecutive; None: of all): a baseline
    that does not depend on the path itself, so that score-function gradients stay unbiased."""
    if ranks.parts() > 1:
        values = ranks.whole(values, -1)
    size = values.shape[-1] if group_size is None else group_size
    v = values.unflatten(-1, (-1, size))
    return ranks.own(((v - v.mean(-1, keepdim=True)) * (size / (size - 1))).flatten(-2), -1)
