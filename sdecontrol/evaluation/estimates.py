"""``Estimate``: a number with its standard error; and estimates from importance weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Estimate", "effective_sample_size", "log_mean_weight", "mean_estimate", "pareto_k"]


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
        digits = max(0, min(12, 1 - math.floor(math.log10(self.stderr))))
        return f"{self.value:.{digits}f} ± {self.stderr:.{digits}f}"

    def __float__(self) -> float:
        return self.value

    def __sub__(self, other: Estimate | float) -> Estimate:
        if isinstance(other, Estimate):
            return Estimate(self.value - other.value, math.hypot(self.stderr, other.stderr))
        return Estimate(self.value - other, self.stderr)


def mean_estimate(values: Tensor) -> Estimate:
    """Mean of independent values ``(n,)`` with its standard error."""
    v = values.detach().double()
    return Estimate(float(v.mean()), float(v.std()) / math.sqrt(len(v)) if len(v) > 1 else float("nan"))


def log_mean_weight(log_w: Tensor) -> Estimate:
    """``log mean exp(log_w)``; the standard error is that of the mean weight, relative to it (delta method)."""
    v = log_w.detach().double()
    n = len(v)
    value = float(torch.logsumexp(v, 0)) - math.log(n)
    relative = (v - value).exp()
    return Estimate(value, float(relative.std()) / math.sqrt(n) if n > 1 else float("nan"))


def effective_sample_size(log_w: Tensor) -> float:
    """``(sum w)^2 / (n sum w^2)``, a fraction of the number of samples."""
    v = log_w.detach().double()
    return float(torch.exp(2 * torch.logsumexp(v, 0) - torch.logsumexp(2 * v, 0))) / len(v)


def pareto_k(log_w: Tensor) -> float:
    """Shape of the generalised Pareto tail of the weights (Vehtari et al. 1507.02646): below 0.7 the mean weight and
    its error can be trusted. 0 or less for bounded weights."""
    from scipy.stats import genpareto

    v = log_w.detach().double().cpu().numpy()
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
