"""How far chains of a Markov sampler have mixed: rank-normalised split R-hat and bulk effective sample size (Vehtari et
al. 1903.08008).

Chains ``(M, N, ...)``, M of them with N draws each. Each is split into its halves, so that a drift within a chain shows
as a difference between chains. R-hat compares the variance of all draws with that within chains, of the draws' normal
scores (the same for heavy tails) and of those of ``|x - median|`` (for scales); it is 1 where chains agree and large
where they sit in different modes. The effective sample size of M N draws is ``M N / tau`` with the integrated
autocorrelation time ``tau = 1 + 2 sum_t rho_t``, summed over Geyer's initial monotone sequence, and ``rho_t`` measured
against the variance over all chains, so that chains which disagree have few effective draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SHOWN = 10  # rows of a printed table


def _split(x: Tensor) -> Tensor:
    """Halves of chains ``(M, N, Q)`` as ``(2 M, N // 2, Q)``, the middle draw of an odd number left out."""
    half = x.shape[1] // 2
    return torch.cat((x[:, :half], x[:, -half:]))


def _normal_scores(x: Tensor) -> Tensor:
    """``Phi^-1((rank - 3/8) / (S + 1/4))`` of all draws of a quantity together, ``(M, N, Q)``; equal draws share their
    mean rank."""
    flat = x.flatten(0, 1)
    ranks = torch.empty_like(flat)
    for q in range(flat.shape[1]):
        _, which, counts = torch.unique(flat[:, q], return_inverse=True, return_counts=True)
        last = counts.cumsum(0).to(flat)
        ranks[:, q] = (last - 0.5 * (counts.to(flat) - 1))[which]
    return torch.special.ndtri((ranks - 0.375) / (len(flat) + 0.25)).reshape(x.shape)


def _variances(x: Tensor) -> tuple[Tensor, Tensor]:
    """Variance within chains, and the estimate of the variance over all of them, ``(Q,)`` each."""
    n = x.shape[1]
    within = x.var(1).mean(0)
    return within, within * (n - 1) / n + x.mean(1).var(0)


def _rhat(x: Tensor) -> Tensor:
    within, total = _variances(x)
    return torch.nan_to_num((total / within).sqrt(), nan=math.inf)  # chains that never move


def _as_double(x: Tensor) -> Tensor:
    if x.ndim == 2:
        x = x.unsqueeze(2)
    if x.ndim != 3 or x.shape[1] < 4:
        raise ValueError(
            f"chains must be (chains, draws) or (chains, draws, quantities), 4 draws at least; got {tuple(x.shape)}."
        )
    return x.detach().double()


def split_rhat(x: Tensor) -> Tensor:
    """The larger one of the rank-normalised split R-hats of draws and of folded draws.

    Args:
        x: ``(chains, draws)`` or ``(chains, draws, Q)``.

    Returns:
        ``(Q,)``, inf where no chain moves. Q is 1 for two dimensions.
    """
    halves = _split(_as_double(x))
    folded = (halves - halves.flatten(0, 1).median(0).values).abs()
    return torch.maximum(_rhat(_normal_scores(halves)), _rhat(_normal_scores(folded)))


def chain_ess(x: Tensor) -> Tensor:
    """Effective number of draws for the mean of each quantity, ``(Q,)``: the error of the mean of all is
    ``sd / sqrt(ess)``.

    0 where chains never move. Draws that cancel one another have more than their number, ``S log10 S`` at most.
    """
    x = _split(_as_double(x))
    m, n, _ = x.shape
    size = m * n
    within, total = _variances(x)
    centred = x - x.mean(1, keepdim=True)
    spectrum = torch.fft.rfft(centred, n=2 * n, dim=1)
    covariance = torch.fft.irfft(spectrum.abs().square(), n=2 * n, dim=1)[:, :n].mean(0) / n
    rho = 1 - (within - covariance) / total
    rho[0] = 1.0
    pairs = rho[: n // 2 * 2].reshape(-1, 2, rho.shape[1]).sum(1)
    kept = (pairs > 0).long().cumprod(0).to(pairs)
    monotone = pairs.cummin(0).values
    tau = (2 * (kept * monotone).sum(0) - 1).clamp(min=1 / math.log10(max(size, 10)))
    return torch.where(total > 0, size / tau, 0.0).nan_to_num(nan=0.0)


def bulk_ess(x: Tensor) -> Tensor:
    """Effective number of draws of the normal scores, ``(Q,)``: that of quantiles in the bulk, whatever the moments."""
    return chain_ess(_normal_scores(_as_double(x)))


@dataclass(frozen=True)
class Diagnostics:
    """What :func:`diagnose` returns; prints as a table of the worst quantities.

    Attributes:
        names: of the Q quantities.
        mean, spread, rhat, ess: ``(Q,)`` each; rhat the rank-normalised split R-hat, ess the bulk effective sample
            size.
        chains, draws: how many, and of how many draws each.
    """

    names: tuple[str, ...]
    mean: Tensor
    spread: Tensor
    rhat: Tensor
    ess: Tensor
    chains: int
    draws: int

    @property
    def worst_rhat(self) -> tuple[str, float]:
        """The quantity of the largest R-hat, and that."""
        worst = int(self.rhat.argmax())
        return self.names[worst], float(self.rhat[worst])

    @property
    def worst_ess(self) -> tuple[str, float]:
        """The quantity of the smallest effective sample size, and that."""
        worst = int(self.ess.argmin())
        return self.names[worst], float(self.ess[worst])

    def __str__(self) -> str:
        order = self.rhat.argsort(descending=True, stable=True)[:_SHOWN].tolist()
        rows = [
            (
                self.names[q],
                *(f"{float(v[q]):.4g}" for v in (self.mean, self.spread)),
                f"{float(self.rhat[q]):.3f}",
                f"{float(self.ess[q]):.0f}",
            )
            for q in order
        ]
        table = [("", "mean", "sd", "R-hat", "bulk ESS"), *rows]
        widths = [max(len(row[i]) for row in table) for i in range(5)]
        lines = [
            f"{row[0]:<{widths[0]}}  " + "  ".join(f"{v:>{w}}" for v, w in zip(row[1:], widths[1:])) for row in table
        ]
        if left := len(self.names) - len(order):
            lines.append(f"and {left} more with smaller R-hat")
        return "\n".join([*lines, f"{self.chains} chains of {self.draws} draws"])


def diagnose(x: Tensor, names: Sequence[str]) -> Diagnostics:
    """R-hat and effective sample size of every quantity of ``(chains, draws, Q)``."""
    v = _as_double(x)
    flat = v.flatten(0, 1)
    return Diagnostics(tuple(names), flat.mean(0), flat.std(0), split_rhat(v), bulk_ess(v), v.shape[0], v.shape[1])
