"""Coordinates in which scales do not depend on a coordinate: the non-centred form of a hierarchy, found from particles.

In the neck of a funnel the standard deviations of some coordinates are the exponential of another one (a log scale of
a hierarchical model), so that no step size fits neck and mouth. With coordinates w,

    z_j = w_j,   z_U = w_U,   z_S = a + C z_U + exp(s + r (w_j - m)) w_S,

the w_S are of one size everywhere (Papaspiliopoulos, Roberts & Skold 2007; found by regression, as 1906.03028 finds it
by variational inference). The map is one to one with ``log |dz/dw| = sum_S s + r (w_j - m)``, so that the density of w
is known exactly: nothing but the size of steps and weights hangs on how good the fit is.

Far down the neck a mean must be right to the width there, which is smaller than that of any particle. So a and C are
regressions in which the narrowest particles count most, and a part of the law has wider tails along w_j.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..processes.laws import GaussianMixture, ProductMixture, draw, mixture_of, mixture_tensors
from .mixture_fit import fit_mixture

_LARGEST = 64  # dimension in which it is looked for
_FEWEST = 200  # effective particles
_SLOPE = 0.15  # change of a log scale over a standard deviation of w_j, that counts
_GAIN = 0.05  # nats of a particle that a map must gain
_MUCH = 0.5  # nats that settle it
_MOST_MAPS, _PASSES = 3, 8
_STEEP, _EACH = 4.0, 10.0  # largest power of the widths that weights are over; effective particles for each number
_TAIL, _WIDE = 0.25, 3.0  # part of a law, and how many times its width along w_j
_BEFORE_TAILS = 16  # components that a law may have before it gets tails, though it has more than ``most`` with them
_MOST_RATIO = 9.0  # squares of residuals over their variance are counted up to this
_FURTHEST = 30.0  # of an exponent
_HELD, _NUMBERS = ("scaled", "weights", "start", "slope"), (torch.float64, torch.long)


@dataclass(frozen=True)
class NonCentred:
    """One map; see the module's head.

    Attributes:
        j: the coordinate on which scales depend. scaled: ``(d,)`` which ones do (S). mean: m.
        weights: ``(d, d + 1)`` of the scaled coordinates, on U and a constant (the last column); 0 elsewhere.
        start, slope: ``(d,)`` s and r, 0 where nothing is scaled.
    """

    j: int
    scaled: Tensor
    mean: float
    weights: Tensor
    start: Tensor
    slope: Tensor

    def _parts(self, held: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log scales of all coordinates, given those that are not scaled."""
        others = torch.where(self.scaled, 0.0, held)
        mean = others @ self.weights[:, :-1].mT + self.weights[:, -1]
        power = self.start + self.slope * (held[:, self.j : self.j + 1] - self.mean)
        return mean, power.clamp(-_FURTHEST, _FURTHEST)

    def __call__(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """z ``(n, d)`` and ``log |dz/dw|`` ``(n,)`` at w."""
        mean, power = self._parts(w)
        return torch.where(self.scaled, mean + power.exp() * w, w), power.sum(1)

    def inverse(self, z: Tensor) -> Tensor:
        """w at z."""
        mean, power = self._parts(z)
        return torch.where(self.scaled, (z - mean) * (-power).exp(), z)


@dataclass(frozen=True)
class Maps:
    """Several of them, the first one nearest to ``(z - centre)/scale``; none: z itself. ``gain``: nats of a particle,
    as they were fitted."""

    maps: tuple[NonCentred, ...] = ()
    centre: Tensor | None = None
    scale: Tensor | None = None
    gain: float = 0.0

    def __call__(self, w: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(w[:, 0])
        for one in reversed(self.maps):
            w, level = one(w)
            total = total + level
        if self.centre is None or self.scale is None:
            return w, total
        return self.centre + self.scale * w, total + self.scale.log().sum()

    def inverse(self, z: Tensor) -> Tensor:
        if self.centre is not None and self.scale is not None:
            z = (z - self.centre) / self.scale
        for one in self.maps:
            z = one.inverse(z)
        return z


IDENTITY = Maps()


@dataclass(frozen=True)
class MappedLaw:
    """The law of ``maps(w)`` with w of a mixture."""

    law: Any
    maps: Maps

    def log_prob(self, z: Tensor) -> Tensor:
        w = self.maps.inverse(z)
        return self.law.log_prob(w) - self.maps(w)[1]

    def widened(self, factor: float) -> MappedLaw:
        """With so many times the variances of the mixture's components."""
        return MappedLaw(self.law.widened(factor), self.maps)

    def draw(self, n: int, seed: int) -> Tensor:
        return self.maps(draw(self.law, n, seed))[0]

    def moved(self, shift: Tensor, factor: Tensor) -> MappedLaw:
        """The law of ``shift + factor z``, with one map or more."""
        assert self.maps.centre is not None and self.maps.scale is not None
        where = {"centre": shift + factor * self.maps.centre, "scale": factor * self.maps.scale}
        return MappedLaw(self.law, replace(self.maps, **where))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of it, with one map or more."""
        assert self.maps.centre is not None and self.maps.scale is not None
        maps = self.maps.maps
        held = {name: torch.stack([getattr(m, name) for m in maps]) for name in _HELD}
        numbers = [m.mean for m in maps], [m.j for m in maps]
        means, along = (torch.tensor(v, dtype=t, device=held["weights"].device) for v, t in zip(numbers, _NUMBERS))
        law = {f"law_{name}": value for name, value in mixture_tensors(self.law).items()}
        return {**held, **law, "mean": means, "j": along, "centre": self.maps.centre, "scale": self.maps.scale}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> MappedLaw:
        """That of :attr:`tensors`."""
        law = {n.removeprefix("law_"): v for n, v in tensors.items() if n.startswith("law_")}
        rows = zip(tensors["j"].tolist(), tensors["mean"].tolist(), *(tensors[name] for name in _HELD))
        made = tuple(NonCentred(j, held[0], mean, *held[1:]) for j, mean, *held in rows)
        return cls(mixture_of(law), Maps(made, tensors["centre"], tensors["scale"]))

    def __repr__(self) -> str:
        return f"{self.law!r} of coordinates whose scales depend on none" if self.maps.maps else repr(self.law)


def fit_law(z: Tensor, log_weights: Tensor | None, *, seed: int, most: int, settled: float = _MUCH) -> MappedLaw:
    """A mixture (:func:`fit_mixture`) of weighted particles, or of their non-centred coordinates where that says more
    of them.

    Args:
        most: components at most, tails included where there are more than sixteen.
        settled: nats of a particle that maps gain, from which a mixture without them is not tried.
    """
    weights = torch.zeros_like(z[:, 0], dtype=torch.float64) if log_weights is None else log_weights.double()
    maps = fit_noncentred(z, weights)
    if not maps.maps:
        return MappedLaw(fit_mixture(z, weights, seed=seed, most=most), IDENTITY)
    along = list(dict.fromkeys(one.j for one in maps.maps))
    each = max(_BEFORE_TAILS, most >> len(along))  # tails double them, once for each coordinate
    mapped = MappedLaw(fit_mixture(maps.inverse(z), weights, seed=seed, most=min(most, each)), maps)
    if maps.gain < settled:
        plain = MappedLaw(fit_mixture(z, weights, seed=seed, most=most), IDENTITY)
        rows = weights > -math.inf
        share, v = weights[rows].softmax(0), z[rows]
        gained = float(share @ (plain.log_prob(v) - mapped.log_prob(v)).double())
        # what more numbers gain on the particles that they were fitted to (Akaike)
        if gained > (_numbers(plain.law) - _numbers(mapped.law)) * float(share.square().sum()):
            return plain
    return MappedLaw(_with_tails(mapped.law, along), maps)


def _numbers(law: Any) -> int:
    """How many a mixture has."""
    if isinstance(law, ProductMixture):
        return 3 * law.means.numel()
    k, d = law.means.shape
    return k * (1 + d + d * (d + 1) // 2)


def _with_tails(law: Any, along: list[int]) -> Any:
    """The law with a part of it wider along some of its coordinates, and in what depends on them."""
    for j in along:
        if isinstance(law, ProductMixture):
            share = torch.zeros_like(law.means)
            share[j] = _TAIL
            wide = law.variances.clone()
            wide[j] *= _WIDE**2
            weights = torch.cat((law.weights * (1 - share), (law.weights * share).clamp(min=1e-12)), 1)
            law = ProductMixture(weights, law.means.repeat(1, 2), torch.cat((law.variances, wide), 1))
            continue
        cov = law.covariances
        ways = cov[:, :, j] / cov[:, j, j].sqrt().unsqueeze(1)
        wide = cov + (_WIDE**2 - 1) * ways.unsqueeze(2) * ways.unsqueeze(1)
        weights = torch.cat((law.weights * (1 - _TAIL), law.weights * _TAIL))
        law = GaussianMixture(weights, law.means.repeat(2, 1), torch.cat((cov, wide)))
    return law


def fit_noncentred(z: Tensor, log_weights: Tensor) -> Maps:
    """Maps to coordinates in which the scales of weighted particles ``(n, d)`` depend on none of the others; none where
    nothing is gained by them."""
    w = log_weights.double().softmax(0)
    alive = w > 0
    if z.shape[1] < 2 or z.shape[1] > _LARGEST or 1 / float(w.square().sum()) < _FEWEST:
        return IDENTITY
    w, v = w[alive], z[alive].double()
    centre = w @ v
    scale = (w @ (v - centre).square()).sqrt()
    if not bool((scale > 0).all()):
        return IDENTITY
    v = (v - centre) / scale
    maps: list[NonCentred] = []
    gain = 0.0
    while len(maps) < _MOST_MAPS:
        found = max((_fit(v, w, j) for j in range(v.shape[1])), key=lambda pair: pair[0])
        if found[0] < _GAIN or found[1] is None:
            break
        maps.append(found[1])
        gain += found[0]
        v = found[1].inverse(v)
    return Maps(tuple(_like(m, z) for m in maps), centre.to(z), scale.to(z), gain) if maps else IDENTITY


def _like(m: NonCentred, z: Tensor) -> NonCentred:
    return NonCentred(m.j, m.scaled, m.mean, *(part.to(z) for part in (m.weights, m.start, m.slope)))


def _fit(v: Tensor, w: Tensor, j: int) -> tuple[float, NonCentred | None]:
    """The map for a coordinate, and the nats that it gains: log variances of residuals as linear functions of it, by
    Fisher scoring."""
    n, d = v.shape
    mean = float(w @ v[:, j])
    t = v[:, j] - mean
    spread = math.sqrt(float(w @ t.square()))
    if spread == 0.0:
        return 0.0, None
    line = torch.stack((torch.ones_like(t), t), 1)
    others = torch.arange(d, device=v.device) != j
    residual = v - _regressed(line, v, w.unsqueeze(1).expand(n, d))
    s, r = _log_scales(residual, line, w)
    scaled = others & (r.abs() * spread > _SLOPE)
    if not bool(scaled.any()):
        return 0.0, None
    held = others & ~scaled
    given = torch.cat((v[:, held], torch.ones_like(v[:, :1])), 1)  # w_U and 1
    y = v[:, scaled]
    plain = y - _regressed(torch.cat((given, t.unsqueeze(1)), 1), y, w.unsqueeze(1).expand(n, y.shape[1]))
    before = 0.5 * (w @ plain.square()).clamp(min=1e-300).log()
    s, r = s[scaled], r[scaled]
    found = y.new_zeros(given.shape[1], y.shape[1])
    for _ in range(_PASSES):
        found = _coefficients(given, y, _narrowest(w, r * t.unsqueeze(1), given.shape[1]))
        s, r = _log_scales(y - given @ found, line, w, (s, r))
    power = s + r * t.unsqueeze(1)
    square = (y - given @ found).square() * (-2 * power).exp()
    gain = float((before - w @ power + 0.5 * (1 - w @ square)).sum())
    rows = scaled.nonzero().flatten()
    columns = torch.cat((held.nonzero().flatten(), rows.new_tensor([d])))
    weights = v.new_zeros(d, d + 1)
    weights[rows.unsqueeze(1), columns] = found.mT
    full = lambda part: v.new_zeros(d).index_copy(0, rows, part)  # noqa: E731
    return gain, NonCentred(j, scaled, mean, weights, full(s), full(r))


def _narrowest(w: Tensor, power: Tensor, numbers: int) -> Tensor:
    """Weights ``(n, k)`` over a power of the widths ``exp(power)``: the second, or a larger one of which enough
    particles are effective for so many numbers."""
    best = w.unsqueeze(1) * (-2 * power).clamp(-_FURTHEST, _FURTHEST).exp()
    for steep in torch.linspace(2.0, _STEEP, 5).tolist():
        level = w.log().unsqueeze(1) - steep * power
        share = level.softmax(0)
        enough = 1 / share.square().sum(0) >= _EACH * numbers
        best = torch.where(enough, share, best)
    return best


def _coefficients(given: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """Of weighted regressions of each column of y ``(n, k)`` on the columns of ``given`` ``(n, m)``, ``(m, k)``."""
    moments = torch.einsum("nk,na,nb->kab", w, given, given)
    ridge = 1e-10 * moments.diagonal(dim1=1, dim2=2)
    right = torch.einsum("nk,na,nk->ka", w, given, y)
    return torch.linalg.solve(moments + torch.diag_embed(ridge + 1e-300), right).mT


def _regressed(given: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return given @ _coefficients(given, y, w)


def _log_scales(
    residual: Tensor, line: Tensor, w: Tensor, known: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """s and r of each column's ``exp(s + r t)``, ``(k,)``: some steps of Fisher scoring."""
    if known is None:
        start = 0.5 * (w @ residual.square()).clamp(min=1e-300).log()
        known = start, torch.zeros_like(start)
    both = torch.stack(known)
    information = torch.linalg.inv((line * w.unsqueeze(1)).mT @ line)
    for _ in range(4):
        ratio = residual.square() * (-2 * (line @ both)).clamp(-2 * _FURTHEST, 2 * _FURTHEST).exp()
        both = both + 0.5 * information @ ((line * w.unsqueeze(1)).mT @ (ratio.clamp(max=_MOST_RATIO) - 1))
    return both[0], both[1]
