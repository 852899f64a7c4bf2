"""``Estimate``: a number with its standard error; and estimates from importance weights and from chains."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..particles.diagnostics import chain_ess
from ..paths.weights import effective_number
from ..shapes import PerPath


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error (nan where it is not known, 0 where the number is exact)."""

    value: float
    stderr: float = float("nan")

    def __str__(self) -> str:
        if not math.isfinite(self.stderr):
            return f"{self.value:.4g}"
        if self.stderr == 0:
            return f"{self.value:.6g} (exact)"
        digits = max(0, 1 - math.floor(math.log10(self.stderr)))
        if digits > 9:
            return f"{self.value:.3g} ± {self.stderr:.2g}"
        return f"{self.value:.{digits}f} ± {self.stderr:.{digits}f}"

    def __float__(self) -> float:
        return self.value

    def __sub__(self, other: Estimate | float) -> Estimate:
        if isinstance(other, Estimate):
            return Estimate(self.value - other.value, math.hypot(self.stderr, other.stderr))
        return Estimate(self.value - other, self.stderr)


def as_plain(made: Any) -> Any:
    """A dataclass of estimates and plain values, or one of its values, as JSON can hold it: numbers that are not finite
    as None."""
    if is_dataclass(made):
        return {field.name: as_plain(getattr(made, field.name)) for field in fields(made)}
    if isinstance(made, dict):
        return {name: as_plain(value) for name, value in made.items()}
    if isinstance(made, Tensor):
        return made.tolist()
    return None if isinstance(made, float) and not math.isfinite(made) else made


def mean_estimate(values: Tensor) -> Estimate:
    """Mean of independent values ``(n,)`` with its standard error."""
    v = values.detach().double()
    return Estimate(float(v.mean()), float(v.std()) / math.sqrt(len(v)) if len(v) > 1 else float("nan"))


def weighted_mean(values: Tensor, log_weights: Tensor) -> Estimate:
    """Mean of ``(n,)`` values under self-normalised weights, with its standard error (delta method)."""
    weights, v = log_weights.detach().double().softmax(0), values.detach().double()
    mean = float((weights * v).sum())
    return Estimate(mean, float((weights * (v - mean)).square().sum().sqrt()))


def jackknife(of: Callable[..., float], *samples: Tensor) -> Estimate:
    """``of(*samples)``, each of independent rows ``(n,)``, with its error from 16 groups of rows, each left out in turn
    of all samples (what is left of n goes into the value alone)."""
    groups = 16
    parts = [v[: len(v) // groups * groups].reshape(groups, -1) for v in samples]
    left_out = [of(*(torch.cat((v[:j], v[j + 1 :])).flatten() for v in parts)) for j in range(groups)]
    spread = torch.tensor(left_out, dtype=torch.float64).var(correction=0)
    return Estimate(of(*samples), float(((groups - 1) * spread).sqrt()))


def chain_mean(values: Tensor) -> Estimate:
    """Mean of the values ``(chains, draws)`` of a stationary Markov chain, its error by their effective number
    (:func:`chain_ess`)."""
    v = values.detach().double()
    return Estimate(float(v.mean()), math.sqrt(_variance_of_mean(v)))


def _variance_of_mean(v: Tensor) -> float:
    """Of independent values ``(n,)``, or of those of chains ``(chains, draws)``."""
    if v.ndim == 1:
        return float(v.var()) / len(v)
    ess = float(chain_ess(v))
    return float(v.var()) / ess if ess > 0 else 0.0 if float(v.var()) == 0 else math.inf


def log_mean_weight(log_w: PerPath) -> Estimate:
    """``log mean exp(log_w)``; the standard error is that of the mean weight, relative to it (delta method)."""
    v = log_w.detach().double()
    n = len(v)
    value = float(torch.logsumexp(v, 0)) - math.log(n)
    if value == -math.inf:  # no weight is above 0
        return Estimate(value)
    relative = (v - value).exp()
    return Estimate(value, float(relative.std()) / math.sqrt(n) if n > 1 else float("nan"))


def effective_sample_size(log_w: PerPath) -> float:
    """``(sum w)^2 / (n sum w^2)``, a fraction of the number of samples."""
    return float(effective_number(log_w.detach().double())) / len(log_w)


def pareto_k(log_w: PerPath) -> float:
    """Shape of the generalised Pareto tail of the weights (Vehtari et al. 1507.02646): below 0.7 the mean weight and
    its error can be trusted. 0 or less for bounded weights."""
    from scipy.stats import genpareto

    v = log_w.detach().double().cpu().numpy()
    if not np.isfinite(v.max()):
        return float("nan")
    w = np.sort(np.exp(v - v.max()))
    count = int(min(0.2 * len(w), 3 * math.sqrt(len(w))))
    if count < 5:
        return float("nan")
    threshold = w[-count - 1]
    tail = w[-count:] - threshold
    if tail[-1] <= 1e-10:
        return 0.0
    shape, _, _ = genpareto.fit(tail / tail.mean(), floc=0)
    # weakly informative prior of ten observations at 0.5, as in the reference implementation
    return float((shape * count + 0.5 * 10) / (count + 10))


def bridge_log_z(reverse: Tensor, forward: Tensor) -> Estimate:
    """log Z from log weights of both sides, by the optimal bridge estimate (Meng & Wong 1996): the root c of
    ``sum_P s(log w - c + l) = sum_Q s(c - log w - l)``, s the logistic function and l the logarithm of the ratio of
    their numbers.

    Args:
        reverse: ``(n,)`` of the sampler's (or proposal's) independent draws; -inf where the target vanishes.
        forward: ``(m,)`` of the target's, assumed independent; or ``(chains, draws)`` of stationary Markov chains. Then
            their effective number stands for their number, in l and in the error.
    """
    a, b = reverse.double(), forward.double()
    number = float(b.numel()) if b.ndim == 1 else min(float(b.numel()), max(1.0, float(chain_ess(b))))
    offset, share = math.log(number / len(a)), number / b.numel()
    finite = torch.cat((a[a.isfinite()], b.flatten()))
    low, high = float(finite.min()) - 1 - abs(offset), float(finite.max()) + 1 + abs(offset)

    def sides(c: float) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(a + offset - c), torch.sigmoid(c - b - offset)

    for _ in range(200):
        middle = 0.5 * (low + high)
        up, down = sides(middle)
        low, high = (middle, high) if float(up.sum()) > share * float(down.sum()) else (low, middle)
    c = 0.5 * (low + high)
    relative = [_variance_of_mean(v) / max(float(v.mean()), 1e-300) ** 2 for v in sides(c)]
    return Estimate(c, math.sqrt(sum(relative)))
