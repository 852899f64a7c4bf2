"""The closed loop's linear part, fitted over a batch of paths: what the variance reduction of adjoint methods needs to
know of a control."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .. import ranks
from ..chains.base import Chain
from ..shapes import Scale, StatePaths
from ..tensors import apply_scale
from .paths import Paths

_MOST = 128  # numbers in the largest state that is fitted
_FAR, _LOOKED_AT = 5.0, 64  # robust spreads, and paths that say how much these are


class ClosedLoop(nn.Module):
    """``I + moves_k``, the Jacobian of the affine fit of the noiseless next state: exact where everything is linear,
    and the identity before the first fit.

    No expectation depends on it, so that it may be of former paths; a fit costs as much as many a network's call.

    Attributes:
        moves: ``(K, d, d)``, saved with what it is part of; None where the state is too large for a fit.
        inverse: of ``I + moves``, the same.
    """

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        n = chain.event_shape.numel()
        self.moves: Tensor | None
        self.inverse: Tensor | None
        zero = None if n > _MOST else chain.times.new_zeros(chain.steps, n, n)
        self.register_buffer("moves", zero)
        self.register_buffer("inverse", None if zero is None else zero + torch.eye(n).to(zero))

    @torch.no_grad()
    def fit(self, paths: Paths, scales: Sequence[Scale]) -> None:
        """Fit whole paths; nothing changes where they are too few, or a fit has no inverse.

        Args:
            scales: of all steps, as kernels give them.
        """
        if self.moves is None or self.inverse is None:
            return
        states = paths.states[:-1].flatten(2).double()  # a path gone far must not hide how the others vary
        _, batch, n = states.shape
        if batch * ranks.parts() < 2 * (n + 1):
            return
        ndim = paths.chain.event_ndim
        kicks = torch.stack([apply_scale(scale, xi, ndim) for scale, xi in zip(scales, paths.noises)])
        moves = paths.states[1:].flatten(2).double() - kicks.flatten(2).double() - states
        slopes, _, level = _weighted_fit(states, moves)
        # where the states do not vary (a Dirac start; rounding is no variation) the next step's fit is the best guess
        known = [j for j, size in enumerate(level.tolist()) if size > 1e-8 * float(level.max())]
        for j in reversed(range(len(slopes))):
            if j not in known and j + 1 < len(slopes):
                slopes[j] = slopes[j + 1] * (paths.chain.step_sizes[j] / paths.chain.step_sizes[j + 1])
        inverse = torch.linalg.inv_ex(slopes + torch.eye(n).to(slopes))[0]
        if bool(inverse.isfinite().all()):
            self.moves.copy_(slopes)
            self.inverse.copy_(inverse)

    def inverse_transposed(self, v: StatePaths) -> StatePaths:
        """``(I + moves_k)^{-T} v_k`` at all steps."""
        return v if self.inverse is None else (v.flatten(2) @ self.inverse).reshape(v.shape)


def affine_fit(states: StatePaths, values: StatePaths) -> tuple[Tensor, Tensor]:
    """Least squares ``values_k = slopes_k states_k + offsets_k`` over a batch of vectors, paths gone far left out:
    ``(K, p, n)`` and ``(K, p)`` in float64. Where states do not vary the slopes are 0."""
    slopes, offsets, _ = _weighted_fit(states.double(), values.double())
    return slopes, offsets


def _weighted_fit(states: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slopes, offsets, and the states' mean variance ``(K,)``, from all processes' rows."""
    n, batch = states.shape[2], states.shape[1]
    weights = _nearness(states)
    total = ranks.mean(torch.cat((weights * states, weights * values, weights), 2).sum(1, keepdim=True))
    x, y = (part / total[..., -1:] for part in (total[..., :n], total[..., n:-1]))
    z = states - x
    cov, cross = ((weights * z).mT @ torch.cat((z, values), 2) / batch).split((n, values.shape[2]), 2)
    cov, cross = ranks.mean(cov), ranks.mean(cross)
    level = cov.diagonal(dim1=1, dim2=2).mean(1)
    floor = (1e-6 * level + 1e-10 * level.max() + 1e-30).reshape(-1, 1, 1)
    slopes = torch.linalg.solve(cov + floor * torch.eye(n, dtype=cov.dtype, device=cov.device), cross).mT
    return slopes, (y - x @ slopes.mT).squeeze(1), level


def _nearness(states: Tensor) -> Tensor:
    """Weights ``(K, batch, 1)``, that of a path ``1/(1 + d^2/_FAR^2)`` with d its distance from the median in robust
    spreads: a path gone far says nothing of how the others move. (No weights change the fit of what is affine.)"""
    some = ranks.first_rows(states[:, :_LOOKED_AT], 1)
    centre = _median(some)
    spread = 1.5 * _median((some - centre).abs())
    away = states - centre
    distance = (away / spread.clamp(min=1e-12 * (1 + float(spread.max())))).square().mean(2, keepdim=True)
    return 1 / (1 + distance / _FAR**2)


def _median(v: Tensor) -> Tensor:
    """The lower median over the second dimension, kept; numpy's selection takes a quarter of the time of torch's."""
    middle = (v.shape[1] - 1) // 2
    found = np.partition(v.cpu().numpy(), middle, axis=1)[:, middle : middle + 1]
    return torch.from_numpy(found).to(v.device)
