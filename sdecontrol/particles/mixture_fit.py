"""``fit_mixture``: a mixture of Gaussians fitted to (weighted) samples, its kind and size chosen on samples held
out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..processes.laws import GaussianMixture, ProductMixture
from ..randomness import Place, derive_seed, generator_for

_FULL, _CORRELATED = 64, 256  # largest dimensions with whole covariances, and with one of all samples
_HELD_OUT = 0.25
_LEAST, _HIGHEST, _NUMBERS = 4096, 16384, 100_000  # samples that choose: at least, at most, and numbers in all of them
_PASSES, _FIRST_PASSES, _ENOUGH = (
    60,
    15,
    1e-3,
)  # of expectation and maximisation at most, and while choosing; nats per sample that are worth another
_NARROW = 1e-3  # least standard deviation of a component, relative to the samples' in that direction
_WIDE, _BESIDE = 3.0, 0.01  # standard deviation and weight of what stands beside a fit while it is judged
_BETTER = 0.01  # nats per held-out sample that a larger mixture must gain
_NARROWEST = 0.02  # least eigenvalue of the samples' correlations, below which they are fitted in coordinates without
_LEAST_CORRELATION = 1e-8  # and at which these stay a covariance in double precision
_EACH = 4  # effective samples for each dimension, that this takes
_ROWS = 2048  # samples whose responsibilities are held at once
_COORDINATE_SIZES = (1, 2, 4, 8)

#: products of coordinates; joint with diagonal covariances; joint with whole ones, from means spread out and from means
#: at random samples
KINDS = ("product", "diagonal", "spread", "random")


def fit_mixture(
    x: Tensor, log_weights: Tensor | None = None, *, seed: int, most: int = 64
) -> GaussianMixture | ProductMixture:
    """The mixture of Gaussians that says most of samples held out, by expectation and maximisation.

    Candidates are joint mixtures of 1, 2, 4, ..., ``most`` components, from two kinds of start (means spread over the
    samples by k-means++, Arthur & Vassilvitskii 2007, which finds separate modes; means at random samples, which finds
    scales within one) with whole covariances, shrunk towards their diagonals by dimension/(effective samples of the
    component), or with diagonal ones (only these above 64 dimensions); and products of mixtures of the single
    coordinates, which have few parameters where a joint mixture would need a component for every combination of modes.
    Three quarters of (some thousands of) the samples choose by the likelihood of the last quarter; the chosen kind and
    size is then fitted to all.

    Args:
        x: ``(n, d)``. log_weights: ``(n,)``, of any sum; None: all equal.
        most: components of a joint mixture at most.

    Returns:
        A law in x's dtype and on its device; components that lost their samples are left out.

    Raises:
        ValueError: fewer than 16 samples (of weights above 0), or samples that are not finite.
    """
    if x.ndim != 2 or len(x) < 16 or not bool(torch.isfinite(x).all()):
        raise ValueError(f"x must be at least 16 finite samples (n, d); got {tuple(x.shape)}.")
    v = x.double()
    w = torch.ones_like(v[:, 0]) if log_weights is None else log_weights.double().softmax(0) * len(v)
    v, w = v[w > 0], w[w > 0]
    if len(v) < 16:
        raise ValueError(f"log_weights: at least 16 samples must have a weight above 0; {len(v)} of {len(x)} have.")
    mean = (w.unsqueeze(1) * v).sum(0) / w.sum()
    scale = ((w.unsqueeze(1) * (v - mean).square()).sum(0) / w.sum()).sqrt().clamp(min=1e-12)
    root = _correlated(v, w, mean, scale)
    z = (v - mean) / scale if root is None else torch.linalg.solve_triangular(root, (v - mean).mT, upper=False).mT
    order = torch.randperm(len(z), generator=generator_for(x.device, seed, Place.MIXTURE_SPLIT), device=x.device)
    order = order[: min(_HIGHEST, max(_LEAST, _NUMBERS // z.shape[1]))]
    cut = max(8, round(_HELD_OUT * len(order)))
    held, kept = ((z[rows], w[rows] * len(rows) / w[rows].sum()) for rows in (order[:cut], order[cut:]))
    best, found, chosen = -math.inf, None, ("diagonal", 1)
    kinds = KINDS if z.shape[1] <= _FULL else KINDS[:2]
    for kind in kinds if root is None else kinds[1:]:
        score, fit, size = _best_size(kind, *kept, *held, most, seed)
        if found is None or score > best + _BETTER:
            best, found, chosen = score, fit, (kind, size)
    assert found is not None
    # what was chosen, gone on with all samples; and begun anew on them, lest a mode have had its few samples among
    # those held out
    anew = first_fit(*chosen, z, w, derive_seed(seed, Place.MIXTURE_LAST_FIT))
    for fit in (found, anew):
        fit.improve(z, w)
    found = max((found, anew), key=lambda fit: float((w * _guarded(fit.log_prob(z), z)).mean()))
    if isinstance(found, _Coordinates):
        middle, width = mean.unsqueeze(1), scale.unsqueeze(1)
        parts = (found.weights.clamp(min=1e-12), middle + width * found.means, width**2 * found.var)
        return ProductMixture(*(part.to(x) for part in parts))
    # axes are found in float64: a narrow direction beside a wide one is below float32's rounding of a covariance
    if root is not None:
        cov = root @ (torch.diag_embed(found.cov) if found.cov.ndim == 2 else found.cov) @ root.mT
        return GaussianMixture(found.weights, mean + found.means @ root.mT, cov).to(x)
    width = scale**2 if found.cov.ndim == 2 else scale.unsqueeze(1) * scale
    return GaussianMixture(found.weights, mean + scale * found.means, found.cov * width).to(x)


def _correlated(v: Tensor, w: Tensor, mean: Tensor, scale: Tensor) -> Tensor | None:
    """The factor of the covariance of samples so correlated that covariances shrunk towards their diagonals would be
    far too wide in a direction across the axes; None where they are not, or too few to say so."""
    d, count = v.shape[1], float(w.sum().square() / w.square().sum())
    if d == 1 or d > _CORRELATED or count < _EACH * d:
        return None
    t = (v - mean) / scale
    correlation = (w.unsqueeze(1) * t).mT @ t / w.sum()
    constant = float(correlation.diagonal().min()) < 0.5
    if constant or float(torch.linalg.eigvalsh(correlation)[0]) > _NARROWEST:
        return None
    floor = _LEAST_CORRELATION * torch.eye(d, dtype=v.dtype, device=v.device)
    return scale.unsqueeze(1) * torch.linalg.cholesky(correlation + floor)


def _best_size(
    kind: str, kept: Tensor, weights: Tensor, held: Tensor, held_weights: Tensor, most: int, seed: int
) -> tuple[float, _Joint | _Coordinates, int]:
    """The best log-likelihood of held-out samples among the sizes of a kind, its fit and size. All are tried: with
    separate modes nothing is gained before there is a component for each."""
    best, chosen, best_size = -math.inf, None, 1
    largest = max(1, min(most, len(kept) // 8))
    powers = (2**j for j in range((largest - 1).bit_length()))  # of two below the largest
    for size in _COORDINATE_SIZES if kind == "product" else (*powers, largest):
        fit = first_fit(kind, size, kept, weights, seed)
        score = float((held_weights * _guarded(fit.log_prob(held), held)).mean())
        if chosen is None or score > best + _BETTER:
            best, chosen, best_size = score, fit, size
    assert chosen is not None
    return best, chosen, best_size


def _guarded(level: Tensor, z: Tensor) -> Tensor:
    """Log densities ``(n,)`` of a fit with a little of a wide Gaussian beside it: one sample that no component expects
    does not decide alone."""
    wide = -0.5 * (z / _WIDE).square().sum(1) - z.shape[1] * math.log(_WIDE * math.sqrt(2 * math.pi))
    return torch.logaddexp(level + math.log1p(-_BESIDE), wide + math.log(_BESIDE))


def first_fit(kind: str, size: int, z: Tensor, w: Tensor, seed: int) -> _Joint | _Coordinates:
    if kind == "product":
        return _Coordinates(z, w, size)
    generator = generator_for(z.device, seed, Place.MIXTURE_FIT, size, KINDS.index(kind))
    if kind == "random":
        return _Joint(z, w, z[torch.randperm(len(z), generator=generator, device=z.device)[:size]], full=True)
    return _Joint(z, w, _spread(z, size, generator), full=kind != "diagonal")


class _Fit:
    """Expectation and maximisation; ``_joint`` gives ``log weight_i + log N`` with components in the last dimension."""

    def _joint(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def _maximise(self, z: Tensor, share: Tensor) -> None:
        raise NotImplementedError

    def improve(self, z: Tensor, w: Tensor, passes: int = _PASSES) -> None:
        """Passes over samples z with weights w, ``(n,)`` of mean 1."""
        before = -math.inf
        for _ in range(passes):
            joint = self._joint(z)
            level = joint.logsumexp(-1, keepdim=True)
            rows = w.reshape(-1, *(1,) * (level.ndim - 1))
            self._maximise(z, (joint - level).exp() * rows)
            now = float((rows * level).sum()) / len(z)
            if now - before < _ENOUGH:
                break
            before = now

    def log_prob(self, z: Tensor) -> Tensor:
        """``(n,)``."""
        level = self._joint(z).logsumexp(-1)
        return level if level.ndim == 1 else level.sum(1)


class _Joint(_Fit):
    """A joint mixture, for samples of mean 0 and variance 1 in every coordinate; starts with each sample at its nearest
    mean."""

    def __init__(self, z: Tensor, w: Tensor, means: Tensor, full: bool) -> None:
        self.full = full
        nearest = torch.cdist(z, means).argmin(1)
        self._maximise(z, torch.nn.functional.one_hot(nearest, len(means)) * w.unsqueeze(1))
        self.improve(z, w, _FIRST_PASSES)

    def _joint(self, z: Tensor) -> Tensor:
        """``log weight_i + log N(z; i)``, ``(n, k)``."""
        (k, d), out = self.means.shape, []
        if not self.full:
            precision = 1 / self.cov
            half = 0.5 * (self.cov.log() + self.means.square() * precision).sum(1)
            level = self.weights.log() - half - 0.5 * d * math.log(2 * math.pi)
            return level - 0.5 * z.square() @ precision.mT + z @ (self.means * precision).mT
        # all components standardise a sample by one product of matrices
        eye = torch.eye(d, dtype=z.dtype, device=z.device).expand(k, d, d)
        inverse = torch.linalg.solve_triangular(self.root, eye, upper=False)
        factors = inverse.flatten(0, 1).mT
        offset = (inverse @ self.means.unsqueeze(2)).flatten()
        half = self.root.diagonal(dim1=1, dim2=2).log().sum(1) + 0.5 * d * math.log(2 * math.pi)
        for part in z.split(_ROWS):
            square = (part @ factors - offset).square().unflatten(1, (k, d)).sum(2)
            out.append(self.weights.log() - half - 0.5 * square)
        return torch.cat(out)

    def _maximise(self, z: Tensor, share: Tensor) -> None:
        d = z.shape[1]
        share = share[:, share.sum(0) > min(2.0, 0.25 * len(z))]
        count = share.sum(0)
        self.weights = count / count.sum()
        self.means = share.mT @ z / count.unsqueeze(1)
        if not self.full:
            second = share.mT @ z.square() / count.unsqueeze(1)
            self.cov = (second - self.means.square()).clamp(min=0.0) + _NARROW**2
            return
        # one component at a time: (n, k, d, d) would not fit
        centred = (z - m for m in self.means)
        cov = torch.stack([(w.unsqueeze(1) * v).mT @ v / c for w, v, c in zip(share.mT, centred, count)])
        diagonal = torch.diag_embed(cov.diagonal(dim1=1, dim2=2))
        shrink = (d * share.square().sum(0) / count**2).clamp(max=1.0).reshape(-1, 1, 1)
        floor = _NARROW**2 * torch.eye(d, dtype=z.dtype, device=z.device)
        self.cov = (1 - shrink) * cov + shrink * diagonal + floor
        self.root = torch.linalg.cholesky(self.cov)


class _Coordinates(_Fit):
    """Mixtures of ``size`` components of all coordinates at once, from equal quantiles."""

    def __init__(self, z: Tensor, w: Tensor, size: int) -> None:
        rank = z.argsort(0).argsort(0) * size // len(z)
        self._maximise(z, torch.nn.functional.one_hot(rank, size) * w.reshape(-1, 1, 1))  # (n, d, k)
        self.improve(z, w, _FIRST_PASSES)

    def _joint(self, z: Tensor) -> Tensor:
        """``log weight_ji + log N(z_j; ji)``, ``(n, d, k)``."""
        square = (z.unsqueeze(2) - self.means).square() / self.var + self.var.log() + math.log(2 * math.pi)
        return self.weights.clamp(min=1e-300).log() - 0.5 * square

    def _maximise(self, z: Tensor, share: Tensor) -> None:
        count = share.sum(0).clamp(min=1e-9)
        self.weights = count / count.sum(1, keepdim=True)
        self.means = torch.einsum("nd,ndk->dk", z, share) / count
        second = torch.einsum("nd,ndk->dk", z.square(), share) / count
        self.var = (second - self.means.square()).clamp(min=0.0) + _NARROW**2


def _spread(z: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """``size`` of the samples, each next one drawn in proportion to its squared distance from those before; the best of
    a few candidates."""
    tries = 2 + int(math.log(size))
    first = int(torch.randint(len(z), (1,), generator=generator, device=z.device))
    chosen = [z[first]]
    nearest = (z - chosen[0]).square().sum(1)
    for _ in range(size - 1):
        if float(nearest.sum()) <= 0:
            break
        options = torch.multinomial(nearest, tries, replacement=True, generator=generator)
        after = torch.minimum(nearest, torch.cdist(z[options], z).square())
        pick = int(after.sum(1).argmin())
        chosen.append(z[options[pick]])
        nearest = after[pick]
    return torch.stack(chosen)
