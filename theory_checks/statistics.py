"""Statistical tests of a whole law, not only of its first two moments. Each gives a p-value; thresholds are the
suite's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from scipy import stats

from .registry import Measurement, as_array, p_value

__all__ = ["GAUSSIAN_TESTS", "gaussian_law", "projections", "two_sided", "z_of_estimate", "z_test"]

GAUSSIAN_TESTS = 6  #: p-values that gaussian_law gives


def two_sided(z: float) -> float:
    return float(2 * stats.norm.sf(abs(z)))


def z_test(what: str, values: Any, mean: float) -> Measurement:
    """Whether independent values have this mean."""
    v = as_array(values)
    return p_value(f"{what} (z-test)", two_sided((v.mean() - mean) / (v.std(ddof=1) / np.sqrt(len(v)))))


def z_of_estimate(what: str, estimate: Any, value: float) -> Measurement:
    """Whether an ``Estimate`` agrees with a number, in its own standard errors."""
    return p_value(f"{what} (z-test)", two_sided((estimate.value - value) / max(estimate.stderr, 1e-12)))


def projections(
    what: str,
    x: np.ndarray,
    cdf: Callable[[np.ndarray, np.ndarray], np.ndarray],
    rng: np.random.Generator,
) -> Iterator[Measurement]:
    """Kolmogorov-Smirnov tests of three random one-dimensional projections (which determine a law: Cramer and Wold);
    ``cdf(values, direction)`` is the projection's exact distribution function."""
    for i in range(3):
        direction = rng.normal(size=x.shape[1])
        direction /= np.linalg.norm(direction)
        test = stats.kstest(x @ direction, lambda v, a=direction: cdf(v, a))
        yield p_value(f"{what}: projection {i + 1} (Kolmogorov-Smirnov)", float(test.pvalue))


def gaussian_law(
    what: str, x: Any, mean: np.ndarray, cov: np.ndarray, rng: np.random.Generator
) -> Iterator[Measurement]:
    """Whether the rows of x ``(n, d)`` are independent draws of N(mean, cov): three projections, the mean (chi-square),
    the scale (sum of squared Mahalanobis distances, chi-square with n d degrees) and the distances' law."""
    x = as_array(x)
    standard = np.linalg.solve(np.linalg.cholesky(cov), (x - mean).T).T
    n, d = standard.shape
    yield from projections(what, standard, lambda v, _: stats.norm.cdf(v), rng)
    yield p_value(f"{what}: mean (chi-square)", float(stats.chi2.sf(n * (standard.mean(0) ** 2).sum(), d)))
    squares = (standard**2).sum(-1)
    total = squares.sum()
    yield p_value(
        f"{what}: scale (chi-square)", float(2 * min(stats.chi2.sf(total, n * d), stats.chi2.cdf(total, n * d)))
    )
    yield p_value(
        f"{what}: Mahalanobis distances (Kolmogorov-Smirnov)", float(stats.kstest(squares, stats.chi2(d).cdf).pvalue)
    )
