"""Distances between sets of samples (POT, scipy), coverage of modes, and the error of a control against an exact
one."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.shifts import shift_function
from ..memory import remembering
from ..paths.paths import Paths
from ..problems.simulate import simulate_chain
from ..randomness import fresh_seed
from ..shapes import Noises, OtherSamples, PerOther, PerPath, Samples, States
from ..tensors import as_float, check_count, check_tensor, event_sum
from .estimates import Estimate, mean_estimate


@dataclass(frozen=True)
class ControlError:
    """``absolute = T^-1 int E |u - u*|^2 dt`` along optimal paths, and ``relative`` to the mean of ``|u*|^2`` there.

    On tokens: ``absolute`` is the mean over the steps of ``E KL(p^{u*}(. | x_k) || p^u(. | x_k))``, and ``relative`` to
    that of the reference, ``E KL(p^{u*}(. | x_k) || p0(. | x_k))``. (Of Gaussian kernels these are half of the above,
    times h: the relative one is the same.)
    """

    absolute: Estimate
    relative: Estimate
    measure: str = "E|u - u*|^2"

    def __str__(self) -> str:
        return f"{self.measure} = {self.absolute}, relative {self.relative}"


def control_error(solution: Any, exact: Any, n: int = 4096, seed: int | None = 0) -> ControlError:
    """Mean squared error of a solution's control, on paths of the exact control (on the solution's own chain); on
    tokens, KL divergence of its kernels per step.

    Args:
        solution: a :class:`Solution`; only the process after time 0 enters (not the learned start).
        exact: an exact solution: in continuous time, or of the chain (``exact_solution(problem, like=solution)``).
    """
    problem, chain = solution.problem, solution.chain
    paths = simulate_chain(problem, chain, n, exact.control, seed=fresh_seed(seed))
    ours, theirs = shift_function(chain, solution.control), shift_function(chain, exact.control)
    error = square = paths.end.new_zeros(n, dtype=torch.float64)
    with torch.no_grad(), problem.evaluating(), remembering():
        for k in range(chain.start, chain.steps):
            x = paths.states[k]
            wrong, size = _step_error(chain, k, x, ours(k, x, paths.condition), theirs(k, x, paths.condition), paths)
            error, square = error + wrong, square + size
    horizon, measure = chain.clock[-1], ControlError.measure
    if not chain.of_noise:
        horizon, measure = float(chain.steps), "KL per step"
    absolute, norm = mean_estimate(error / horizon), float(square.mean()) / horizon
    if norm == 0:
        return ControlError(absolute, Estimate(math.nan), measure)
    ratio = absolute.value / norm
    spread = ((error / horizon) - ratio * square / horizon).std() / norm  # delta method for a ratio of means
    return ControlError(absolute, Estimate(ratio, float(spread) / math.sqrt(n)), measure)


def _step_error(chain: Chain, k: int, x: States, ours: Noises, star: Noises, paths: Paths) -> tuple[PerPath, PerPath]:
    """What step k adds to the error of shifts, and to the size of the optimal ones."""
    if not chain.of_noise:
        options: Any = {"states": x.unsqueeze(0), "steps": [k], "condition": paths.condition}
        at = star.unsqueeze(0)
        wrong, size = chain.kl(at, other=ours.unsqueeze(0), **options), chain.kl(at, **options)
        return wrong[0].double(), size[0].double()
    u, best = chain.control(k, ours), chain.control(k, star)
    h = chain.step_sizes[k]
    return event_sum((u - best) ** 2, u.ndim - 1).double() * h, event_sum(best**2, u.ndim - 1).double() * h


def _arrays(a: Samples, b: OtherSamples, weights_a: PerPath | None, weights_b: PerOther | None) -> tuple[Any, ...]:
    if not (len(a) and len(b)):
        raise ValueError(f"a distance needs samples on both sides, got {len(a)} and {len(b)}.")
    parts: list[Any] = [x.detach().flatten(1).double().cpu().numpy() for x in (a, b)]
    for log_w in (weights_a, weights_b):
        parts.append(None if log_w is None else torch.softmax(log_w.detach().double().cpu(), 0).numpy())
    return tuple(parts)


def wasserstein(
    a: Samples, b: OtherSamples, log_weights_a: PerPath | None = None, log_weights_b: PerOther | None = None
) -> float:
    """Exact 2-Wasserstein distance between samples, optionally weighted."""
    import ot

    x, y, w, v = _arrays(a, b, log_weights_a, log_weights_b)
    w, v = ot.unif(len(x)) if w is None else w, ot.unif(len(y)) if v is None else v
    cost: Any = ot.emd2(w, v, ot.dist(x, y), numItermax=10_000_000)
    return math.sqrt(max(float(cost), 0.0))


def sinkhorn(a: Samples, b: OtherSamples, regularisation: float = 0.1) -> float:
    """Debiased entropic transport cost (squared Euclidean) between samples."""
    import ot

    x, y, _, _ = _arrays(a, b, None, None)
    value: Any = ot.bregman.empirical_sinkhorn_divergence(x, y, regularisation)
    return float(value)


def sliced_wasserstein(
    a: Samples,
    b: OtherSamples,
    *,
    order: int = 1,
    directions: int = 500,
    seed: int = 0,
    log_weights_a: PerPath | None = None,
    log_weights_b: PerOther | None = None,
) -> float:
    """Sliced Wasserstein distance of the given order, over random directions."""
    import ot

    x, y, w, v = _arrays(a, b, log_weights_a, log_weights_b)
    value: Any = ot.sliced_wasserstein_distance(x, y, w, v, n_projections=directions, p=order, seed=seed)
    return float(value)


def _shares(log_weights: Tensor | None, n: int) -> Tensor:
    if log_weights is None:
        return torch.full((n,), 1 / n, dtype=torch.float64)
    return torch.softmax(log_weights.detach().double().cpu(), 0)


def mmd(
    a: Samples,
    b: OtherSamples,
    bandwidth: float | None = None,
    log_weights_a: PerPath | None = None,
    log_weights_b: PerOther | None = None,
) -> float:
    """Squared maximum mean discrepancy between samples, optionally weighted.

    Kernel ``exp(-|x - y|^2 / (2 bandwidth^2))``; the U-statistic of Gretton et al. (JMLR 2012, Lemma 6; pairs of a
    sample with itself left out), so that it has mean 0 for equal laws without weights, and may be negative.

    Args:
        bandwidth: None: the median distance between two samples of the pooled sets (the first 1000 of each).
    """
    x, y = (v.detach().flatten(1).double().cpu() for v in (a, b))
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"a and b must have samples of one size, got {x.shape[1]} and {y.shape[1]}.")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"mmd needs at least two samples on each side, got {len(x)} and {len(y)}.")
    if bandwidth is None:
        median = torch.nn.functional.pdist(torch.cat((x[:1000], y[:1000]))).median()
        bandwidth = float(median) if float(median) > 0 else 1.0
    width = as_float("bandwidth", bandwidth, positive=True)
    w, v = _shares(log_weights_a, len(x)), _shares(log_weights_b, len(y))

    def mean_kernel(p: Tensor, q: Tensor, w: Tensor, v: Tensor, same: bool) -> float:
        total, pairs = 0.0, 0.0
        for start in range(0, len(p), 1024):  # in blocks: memory linear in the number of samples
            rows = slice(start, start + 1024)
            kernel = (
                torch.cdist(p[rows], q, compute_mode="donot_use_mm_for_euclid_dist")
                .square()
                .mul_(-0.5 / width**2)
                .exp_()
            )
            total += float(w[rows] @ kernel @ v)
            pairs += float(w[rows].sum() * v.sum())
        if same:
            own = float(w @ v)
            if own > 1 - 1e-12:
                raise ValueError("mmd needs more than one sample with weight on each side.")
            total, pairs = total - own, pairs - own
        return total / pairs

    return mean_kernel(x, x, w, w, True) + mean_kernel(y, y, v, v, True) - 2 * mean_kernel(x, y, w, v, False)


def energy_wasserstein(
    a: Samples,
    b: OtherSamples,
    log_density: Callable[[Samples], PerPath],
    log_weights_a: PerPath | None = None,
    log_weights_b: PerOther | None = None,
    *,
    order: int = 1,
) -> float:
    """Wasserstein distance of the given order between the laws of the energy ``-log_density`` of samples ``(n, ...)``
    and ``(m, ...)``: the distance of their energy histograms without bins. Invariant under all symmetries of the
    target.

    Raises:
        ValueError: an energy that is not finite, with the side and the number of rows.
    """
    import ot

    check_count("order", order, 1)
    energies = []
    with torch.no_grad():
        for name, x in (("a", a), ("b", b)):
            values = -log_density(x).double().cpu()
            bad = int((~torch.isfinite(values)).sum())
            if bad:
                raise ValueError(
                    f"log_density is not finite in {bad} of the {len(values)} samples {name}: leave these out."
                )
            energies.append(values.numpy())
    _, _, w, v = _arrays(a[:, :1], b[:, :1], log_weights_a, log_weights_b)
    distance: Any = ot.wasserstein_1d
    return max(float(distance(*energies, w, v, p=order)), 0.0) ** (1 / order)


@dataclass(frozen=True)
class ModeCoverage:
    """Which modes a sample covers.

    Attributes:
        shares: of the samples (their weights), by mode, ``(modes,)``.
        hit: number of modes whose share is at least the required part of their weight.
        missed: indices of the others.
        far: share of the samples that belong to no mode (beyond the radius).
    """

    shares: Tensor
    hit: int
    missed: list[int]
    far: float

    def __str__(self) -> str:
        far = f", {self.far:.1%} far from all" if self.far > 0 else ""
        return f"{self.hit}/{len(self.shares)} modes{far}"


def mode_coverage(
    samples: Samples,
    modes: OtherSamples,
    *,
    radius: float | None = None,
    weights: PerOther | None = None,
    least: float = 0.1,
    log_weights: PerPath | None = None,
) -> ModeCoverage:
    """Shares of the samples by mode, and how many modes are hit.

    Rule: a sample belongs to the mode nearest to it in Euclidean distance, if that is within ``radius``; a mode is hit
    if its share of the samples is at least ``least`` times its weight (and not 0). With n samples a mode of weight w is
    then missed by chance with probability about ``P(Poisson(n w) < least n w)``: 3e-4 at n w = 10.

    Args:
        samples, modes: of one event.
        radius: None: however far. For modes of standard deviation s in d dimensions, ``4 s sqrt(d)`` tells a sample of
            a mode from one in between.
        weights: of the modes, normalised here; None: equal.
        log_weights: of the samples.
    """
    x, centres = (
        check_tensor(n, v).detach().flatten(1).double().cpu() for n, v in (("samples", samples), ("modes", modes))
    )
    if x.shape[1] != centres.shape[1]:
        raise ValueError(f"samples and modes must have one size, got {x.shape[1]} and {centres.shape[1]}.")
    k = len(centres)
    wanted = torch.full((k,), 1 / k, dtype=torch.float64) if weights is None else weights.detach().double().cpu()
    if wanted.shape != (k,) or not bool((wanted > 0).all()):
        raise ValueError(f"weights must be ({k},) positive numbers, one per mode; got shape {tuple(wanted.shape)}.")
    share = _shares(log_weights, len(x))
    distance, nearest = torch.cdist(x, centres, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    if radius is not None:
        share = torch.where(distance <= as_float("radius", radius, positive=True), share, torch.zeros_like(share))
    shares = torch.zeros(k, dtype=torch.float64).index_add(0, nearest, share)
    hits = (shares >= (1 - 1e-6) * least * wanted / wanted.sum()) & (shares > 0)  # shares are sums of rounded numbers
    return ModeCoverage(
        shares, int(hits.sum()), (~hits).nonzero().flatten().tolist(), max(0.0, 1 - float(shares.sum()))
    )
