"""Whether weighted samples agree, coordinate by coordinate: between independent systems of particles, and with samples
drawn in another way.

What is compared are shares of the samples above three quantiles of every coordinate: bounded numbers, so that heavy
tails do no harm, and necks and tails are seen that a mean does not show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..particles.smc import Particles

LEVELS = (0.1, 0.5, 0.9)
_MOST = 256  # coordinates that are looked at, evenly spaced among all


@dataclass(frozen=True)
class Shares:
    """Shares of the target above quantiles of the coordinates, with what they are compared by.

    Attributes:
        coordinates: ``(c,)`` which ones. quantiles: ``(3, c)``.
        share, error: ``(3, c)``, the errors from the differences between systems.
    """

    coordinates: Tensor
    quantiles: Tensor
    share: Tensor
    error: Tensor

    def name(self, row: int, column: int) -> str:
        """One of them, in words."""
        return f"x[{int(self.coordinates[column])}] and its {LEVELS[row]:.0%} quantile"

    def worst(self) -> tuple[str, float]:
        """The one that differs most between systems, and of how many independent draws it has the error."""
        # no system differs where none, or all, lies above: the last of a few tokens, a coordinate that never moves
        effective = (self.share * (1 - self.share) / self.error.square()).where(self.error > 0, math.inf)
        row, column = divmod(int(effective.argmin()), effective.shape[1])
        return self.name(row, column), float(effective[row, column])

    def against(self, x: Tensor, log_w: Tensor) -> tuple[str, float, float]:
        """The one that differs most from weighted samples ``(n, d)`` of another kind, the difference, and that in
        standard errors, twice the other samples' own."""
        w = log_w.softmax(0)
        above = (x[:, self.coordinates] > self.quantiles.unsqueeze(1)).double()
        other = (w.unsqueeze(1) * above).sum(1)
        variance = (w.square().unsqueeze(1) * (above - other.unsqueeze(1)).square()).sum(1)
        apart = (other - self.share).abs()
        sigmas = apart / (self.error.square() + 4 * variance).sqrt().clamp(min=1e-12)
        row, column = divmod(int(sigmas.argmax()), sigmas.shape[1])
        return self.name(row, column), float(apart[row, column]), float(sigmas[row, column])


def shares_of(found: Particles) -> Shares:
    """Those of systems of particles."""
    x = found.end.flatten(2)
    systems, number, d = x.shape
    coordinates = torch.linspace(0, d - 1, min(d, _MOST), device=x.device).round().long()
    x, w = x[:, :, coordinates], found.log_weights.exp()
    each = found.log_z.softmax(0)
    flat, order = x.flatten(0, 1).sort(dim=0)
    mass = (each.unsqueeze(1) * w).flatten()[order].cumsum(0)
    places = torch.stack([(mass < level).sum(0).clamp(max=systems * number - 1) for level in LEVELS])
    quantiles = flat.gather(0, places)
    shares, errors = [], []
    for row in quantiles:
        own = (w.unsqueeze(2) * (x > row)).sum(1)
        share = each @ own
        shares.append(share)
        errors.append((each.square() @ (own - share).square() * systems / max(1, systems - 1)).sqrt())
    return Shares(coordinates, quantiles, torch.stack(shares), torch.stack(errors))


def bonferroni(sigmas: float, comparisons: int) -> float:
    """The number of standard errors that so many comparisons exceed as rarely as one exceeds ``sigmas``."""
    tail = torch.special.ndtr(torch.tensor(-sigmas, dtype=torch.float64)) / max(1, comparisons)
    return -float(torch.special.ndtri(tail)) if float(tail) > 0 else math.inf
