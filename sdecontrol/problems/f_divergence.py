"""``FDivergence``: other divergences than KL, as a change of the reward (tutorial Remark 7; Tang 2403.06279)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteError, check_name
from ..precision import call
from ..shapes import PerPath, Samples
from ..tensors import as_float, check_output, check_tensor


@dataclass(frozen=True)
class _Generator:
    """``log max(0, (phi')^{-1}(y))``, elementwise: -inf where the maximum clips; infinite from ``upper`` on, the
    supremum of phi'."""

    log_inverse: Callable[[Tensor], Tensor]
    upper: float = math.inf


def _log_positive(x: Tensor) -> Tensor:
    """``log max(0, x)`` with a gradient of 0 (not nan) where it is -inf."""
    inside = x > 0
    return torch.where(inside, torch.where(inside, x, 1.0).log(), -math.inf)


def _power(order: float, scale: float = 1.0) -> _Generator:
    """``phi = scale (t^a - a t - 1 + a)/(a (a - 1))``, ``phi' = scale (t^(a-1) - 1)/(a - 1)``, with their limits at a =
    0 and 1."""
    if order == 1:
        return _Generator(lambda y: y / scale)
    upper = math.inf if order > 1 else scale / (1 - order)
    return _Generator(lambda y: _log_positive(1 + (order - 1) * y / scale) / (order - 1), upper)


def _jensen_shannon(y: Tensor) -> Tensor:
    """``phi = (t log(2t/(1+t)) + log(2/(1+t)))/2``, ``phi' = log(2t/(1+t))/2``: ``t = e^{2y}/(2 - e^{2y})``."""
    return 2 * y - _log_positive(2 - (2 * y).exp())


#: generators by name, each with phi(1) = phi'(1) = 0: "chi-squared" is (t-1)^2, "hellinger" (sqrt t - 1)^2/2 (up to a
#: linear term)
_GENERATORS = {
    "kl": _power(1.0),
    "reverse-kl": _power(0.0),
    "chi-squared": _power(2.0, scale=2.0),
    "hellinger": _power(0.5, scale=0.25),
    "jensen-shannon": _Generator(_jensen_shannon, 0.5 * math.log(2.0)),
}
F_DIVERGENCES = (*_GENERATORS, "alpha-divergence")


class FDivergence:
    """The reward with which KL regularisation solves ``argmax_q E_q[r] - alpha D_phi(q || p)``,
    ``D_phi = E_p[phi(q/p)]``, p the reference's law at the end::

        q = p max(0, (phi')^{-1}((r - lam)/alpha)),      r~ = alpha log max(0, (phi')^{-1}((r - lam)/alpha)).

    With ``ControlProblem(..., reward=FDivergence(r, ...), alpha=alpha)``, the same alpha, ``exp(r~/alpha)`` is ``q/p``
    and the problem's log Z is 0. As for every reward the end has the law q where the start is a point, controlled or
    forgotten.

    ``lam`` solves the normalisation ``E_p[q/p] = 1``, here over samples of the reference: an estimate, whose error is
    in ``multiplier_stderr``. (For "kl" it only shifts the reward.)

    Example::

        plain = sc.ControlProblem(sde, reward=my_reward, alpha=0.5)
        x = sc.simulate(plain, 65536, keep="end").samples
        problem = sc.ControlProblem(sde, reward=sc.FDivergence(my_reward, "chi-squared", alpha=0.5, samples=x),
        alpha=0.5)

    Args:
        reward: ``r(x) -> (batch,)``; with a gradient or without.
        phi: "kl", "reverse-kl", "chi-squared", "hellinger", "jensen-shannon", "alpha-divergence" (with ``order``), or
            ``(phi')^{-1}`` itself: an increasing function, elementwise on tensors; where it is not positive the maximum
            clips.
        alpha: the temperature, > 0; the problem's must be the same.
        samples: ``(n, *event)``, decoded ends of the reference's paths; the more, the smaller the error of lam.
        order: a of "alpha-divergence", ``phi = (t^a - a t - 1 + a)/(a (a-1))``: 1 is KL, 0 reverse KL, 2 half of
            chi-squared.
        floor: smallest value of r~. Where q = 0, ``r~ = -inf``, which no method can take: None refuses where that
            happens to a sample; a floor keeps r~ finite, a law ``q/p >= exp(floor/alpha)`` there (so
            ``floor=-20 * alpha`` changes little) and a gradient of 0: no gradient leads out of the region.

    Attributes:
        multiplier, multiplier_stderr: lam and its standard error.
        clipped: fraction of the samples with q = 0.
        normalisation_stderr: relative standard error with which ``E_p[q/p]`` is 1.

    Raises:
        ValueError: an unknown name, no lam that normalises, or clipping without a floor. NonFiniteError: the reward is
            not finite on the samples; when called, a reward so far above all samples that q/p is infinite
            ("reverse-kl", "hellinger", "jensen-shannon", orders < 1).
    """

    def __init__(
        self,
        reward: Callable[[Tensor], Tensor],
        phi: str | Callable[[Tensor], Tensor],
        *,
        alpha: float,
        samples: Tensor,
        order: float | None = None,
        floor: float | None = None,
    ) -> None:
        if not callable(reward):
            raise TypeError(f"reward must be a function x -> (batch,), got {type(reward).__name__}.")
        self.reward, self.phi = reward, phi
        self.alpha = as_float("alpha", alpha, positive=True)
        self.floor = None if floor is None else as_float("floor", floor)
        self._generator = _find(phi, order)
        tokens = isinstance(samples, Tensor) and samples.dtype == torch.int64
        check_tensor(
            "samples",
            samples,
            hint="samples: decoded ends of the reference's paths, (n, *event).",
            dtype=torch.int64 if tokens else None,
        )
        if samples.ndim < 2 or len(samples) < 2:
            raise ValueError(f"samples must have shape (n, *event) with n >= 2, got {tuple(samples.shape)}.")
        with torch.no_grad():
            value = reward(samples)
            like = value if tokens and isinstance(value, Tensor) else samples
            value = check_output("reward", value, (len(samples),), like, "One number per row.").double()
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(
                f"the reward is not finite in {int((~torch.isfinite(value)).sum())} of {len(value)} samples.",
                what="reward",
            )
        self.multiplier = self._solve(value)
        ratio = self._log_ratio(value, self.multiplier).exp()
        self.normalisation_stderr = float(ratio.std()) / math.sqrt(len(ratio))
        step = 1e-4 * self.alpha
        slope = (self._log_mean(value, self.multiplier + step) - self._log_mean(value, self.multiplier - step)) / (
            2 * step
        )
        self.multiplier_stderr = self.normalisation_stderr / abs(slope) if slope else math.nan
        self.clipped = float((ratio == 0).double().mean())
        if self.clipped and self.floor is None:
            raise ValueError(
                f"floor is missing: the optimum leaves out {self.clipped:.2%} of the samples (q = 0), where the "
                f"changed reward is -inf. Pass a floor, e.g. floor={-20 * self.alpha:g}, which keeps q/p at exp(-20) "
                "there."
            )

    # ---------------------------------------------------------------- the normalisation

    def _log_ratio(self, value: Tensor, multiplier: float) -> Tensor:
        """``log q/p`` where the reward is ``value``."""
        y = (value - multiplier) / self.alpha
        out = self._generator.log_inverse(y)
        return torch.where(y < self._generator.upper, out, math.inf) if math.isfinite(self._generator.upper) else out

    def _log_mean(self, value: Tensor, multiplier: float) -> float:
        logs = self._log_ratio(value, multiplier)
        return float(torch.logsumexp(logs, 0)) - math.log(len(logs))

    def _solve(self, value: Tensor) -> float:
        """``lam`` with ``log mean q/p = 0`` over the samples: it falls with lam, so by bisection to rounding."""
        low, high, step = float(value.min()), float(value.max()), self.alpha
        for _ in range(60):  # the ends of the rewards bracket it for every generator with phi'(1) = 0
            if self._log_mean(value, low) >= 0:
                break
            low, step = low - step, 2 * step
        step = self.alpha
        for _ in range(60):
            if self._log_mean(value, high) <= 0:
                break
            high, step = high + step, 2 * step
        if not self._log_mean(value, low) >= 0 >= self._log_mean(value, high):
            raise ValueError(
                "phi: no multiplier normalises E_p[q/p] = 1; (phi')^{-1} must be increasing and take values below and "
                "above 1."
            )
        for _ in range(200):
            middle = 0.5 * (low + high)
            if middle in (low, high):
                break
            low, high = (middle, high) if self._log_mean(value, middle) > 0 else (low, middle)
        return high

    # ---------------------------------------------------------------- the reward

    def __call__(self, x: Samples) -> PerPath:
        """``r~(x)``, ``(batch,)``."""
        value = call(self.reward, x)
        changed = self.alpha * self._log_ratio(value, self.multiplier)
        if bool((changed == math.inf).any()):
            rows = int((changed == math.inf).sum())
            largest = self.multiplier + self.alpha * self._generator.upper
            raise NonFiniteError(
                f"FDivergence: q/p is infinite in {rows} of {len(changed)} rows: the reward reaches "
                f"{float(value.detach().max()):.4g}, the limit is {largest:.4g}, from the largest reward of the "
                "samples. Use more samples, a bounded reward, a larger alpha, or phi='kl'.",
                what="reward",
                rows=rows,
            )
        return changed if self.floor is None else changed.clamp(min=self.floor)

    def __repr__(self) -> str:
        name = self.phi if isinstance(self.phi, str) else getattr(self.phi, "__name__", "phi")
        return (
            f"FDivergence({name}, alpha={self.alpha:g}, multiplier={self.multiplier:.6g} ± "
            f"{self.multiplier_stderr:.1g})"
        )


def _find(phi: Any, order: float | None) -> _Generator:
    if phi == "alpha-divergence":
        if order is None:
            raise ValueError("order is missing: phi='alpha-divergence' needs it, e.g. order=0.5.")
        return _power(as_float("order", order))
    if order is not None:
        raise ValueError("order goes with phi='alpha-divergence' and only with it.")
    if isinstance(phi, str):
        check_name("phi", phi, F_DIVERGENCES)
        return _GENERATORS[phi]
    if not callable(phi):
        raise TypeError(f"phi must be a name or (phi')^-1 as a function, got {type(phi).__name__}.")
    given: Any = phi
    return _Generator(lambda y: _log_positive(given(y)))
