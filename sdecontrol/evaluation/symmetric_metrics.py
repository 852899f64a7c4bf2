"""Distances of configurations of equal particles, which rotations, reflections, translations and renumberings leave at
0."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from ..shapes import OtherSamples, PerOther, PerPath, Samples
from ..tensors import check_count, check_tensor

_ALL_ORDERS = 5  # particles, up to which every renumbering is tried
_ROUNDS = 3  # of renumbering and rotating in turn
_ROWS = 1 << 16  # pairs at once


def symmetric_distances(a: Samples, b: OtherSamples, space: int) -> Tensor:
    """``(n, m)``: ``min |x - R P y|`` over orthogonal R and renumberings P, centres of mass aside.

    ``|x|^2 + |y|^2 - 2 |x^T P y|_*`` with the nuclear norm, which is the best of all R (Kabsch). Up to five particles
    all P are tried, and the distance is exact. With more, P is the best assignment given R and R the best given P, in
    turn, from the principal axes of both in all orientations: the distance found is an upper bound, 0 for copies.

    Args:
        a, b: ``(n, particles space)`` and ``(m, particles space)``. space: dimension in which the particles are.

    Raises:
        ValueError: samples that are no configurations in so many dimensions.
    """
    check_count("space", space, 1)
    x, y = (check_tensor(name, v).detach().double().cpu() for name, v in (("a", a), ("b", b)))
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or x.shape[1] % space:
        raise ValueError(
            f"a and b must be configurations (n, particles * {space}) of as many particles; got {tuple(x.shape)} and "
            f"{tuple(y.shape)}."
        )
    x, y = (v.unflatten(1, (-1, space)) for v in (x, y))
    x, y = (v - v.mean(1, keepdim=True) for v in (x, y))
    inner = _best_of_all if x.shape[1] <= _ALL_ORDERS else _alternating
    rows = max(1, _ROWS // len(y))
    best = torch.cat([inner(part, y) for part in x.split(rows)])
    square = x.square().sum((1, 2)).unsqueeze(1) + y.square().sum((1, 2)) - 2 * best
    return square.clamp(min=0.0).sqrt()


def symmetric_wasserstein(
    a: Samples,
    b: OtherSamples,
    space: int,
    log_weights_a: PerPath | None = None,
    log_weights_b: PerOther | None = None,
) -> float:
    """2-Wasserstein distance of laws of configurations by :func:`symmetric_distances`, optionally weighted: the
    geometric W2 of adjoint sampling (2504.11713) and 2506.22565. Some hundreds of samples on each side."""
    import ot

    squares = symmetric_distances(a, b, space).square().numpy()
    shares = [
        ot.unif(len(v)) if w is None else torch.softmax(w.detach().double().cpu(), 0).numpy()
        for v, w in ((a, log_weights_a), (b, log_weights_b))
    ]
    cost: Any = ot.emd2(shares[0], shares[1], squares, numItermax=10_000_000)
    return math.sqrt(max(float(cost), 0.0))


def _nuclear(m: Tensor) -> Tensor:
    """Sum of the singular values of ``(..., s, s)``."""
    if m.shape[-1] == 1:
        return m.abs().flatten(-2).squeeze(-1)
    if m.shape[-1] == 2:
        return (m.square().sum((-2, -1)) + 2 * torch.linalg.det(m).abs()).sqrt()
    return torch.linalg.svdvals(m).sum(-1)


def _best_of_all(x: Tensor, y: Tensor) -> Tensor:
    """The largest nuclear norm over all renumberings, ``(n, m)``."""
    best = x.new_full((len(x), len(y)), -math.inf)
    for order in itertools.permutations(range(x.shape[1])):
        best = torch.maximum(best, _nuclear(torch.einsum("nps,mpt->nmst", x, y[:, list(order)])))
    return best


def _alternating(x: Tensor, y: Tensor) -> Tensor:
    """The largest nuclear norm found, ``(n, m)``."""
    n, m, space = len(x), len(y), x.shape[2]
    axes = [torch.linalg.eigh(v.mT @ v).eigenvectors for v in (x, y)]
    left, right = x.repeat_interleave(m, 0), y.repeat(n, 1, 1)
    best = x.new_full((n * m,), -math.inf)
    for signs in itertools.product((1.0, -1.0), repeat=space):
        turned = axes[0].unsqueeze(1) @ torch.diag(x.new_tensor(signs)) @ axes[1].mT
        rotation = turned.flatten(0, 1)  # x ~ y R^T
        for _ in range(_ROUNDS):
            order = _assigned(left @ rotation @ right.mT)
            cross = left.mT @ right.gather(1, order.unsqueeze(2).expand_as(right))
            u, sizes, vh = torch.linalg.svd(cross)
            rotation = u @ vh
            best = torch.maximum(best, sizes.sum(-1))
    return best.unflatten(0, (n, m))


def _assigned(gain: Tensor) -> Tensor:
    """For each of ``(rows, p, p)`` the assignment of columns to rows that gains most, ``(rows, p)``."""
    from scipy.optimize import linear_sum_assignment

    found = [linear_sum_assignment(one, maximize=True)[1] for one in gain.numpy()]
    return torch.stack([torch.from_numpy(v) for v in found])
