"""Other people's samplers of a density with an evidence, on the densities of :mod:`.posteriors`: nested sampling
(dynesty), nested sampling with importance weights and neural bounds (nautilus), preconditioned Monte Carlo (pocoMC).

Each is called with its own defaults and begins with the prior: the normal law that is in the density, or a box that
holds it.
"""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import norm, uniform
from torch import Tensor

LIMIT = 900.0  # CPU-seconds that a run may take
_LIVE = 500
_LOWEST = -1e300  # in the place of -inf, which some of them do not take

#: log Z, its error, draws, weights
Found = tuple[float, float, Tensor, Tensor]


class NotEnded(RuntimeError):
    """A run that took longer than it may."""


@dataclass
class Likelihood:
    """The density without its prior, of numpy's arrays; counts rows, and ends what takes too long.

    Args:
        log_density: ``(n, d) -> (n,)`` of torch's tensors; where ``alone``, ``(d,)`` of numpy's to a number.
        low, high: of the box, a number or ``(d,)``. prior: mean and standard deviation of the normal law that is in
            the density; None: none, and the box is the prior.
        limit: CPU-seconds that a run may take.
    """

    log_density: Any
    dim: int
    low: Any
    high: Any
    prior: Any
    alone: bool
    limit: float = LIMIT
    asked: int = 0

    def __post_init__(self) -> None:
        self.low, self.high = (np.broadcast_to(np.asarray(v, float), (self.dim,)) for v in (self.low, self.high))
        self.until = time.process_time() + self.limit

    @property
    def log_volume(self) -> float:
        """What Z of a density on the box has beyond the mean of its values."""
        return float(np.log(self.high - self.low).sum()) if self.prior is None else 0.0

    def marginals(self) -> list[Any]:
        """Of the prior, a law of scipy's for each coordinate."""
        if self.prior is None:
            return [uniform(a, b - a) for a, b in zip(self.low, self.high)]
        mean, sd = (np.broadcast_to(np.asarray(v, float), (self.dim,)) for v in self.prior)
        return [norm(m, s) for m, s in zip(mean, sd)]

    def transform(self, u: np.ndarray) -> np.ndarray:
        """Of the unit cube to the prior."""
        if self.prior is None:
            return self.low + (self.high - self.low) * u
        mean, sd = self.prior
        return mean + sd * norm.ppf(u)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """``(n, d) -> (n,)``, or ``(d,)`` to a number."""
        if time.process_time() > self.until:
            raise NotEnded(f"more than {self.limit:g} CPU-seconds, {self.asked} evaluations")
        rows = np.atleast_2d(x)
        self.asked += len(rows)
        if self.alone:
            found = np.array([self.log_density(row) for row in rows])
        else:
            found = self.log_density(torch.from_numpy(rows)).numpy()
        if self.prior is not None:
            found = found - norm.logpdf(rows, *self.prior).sum(1)
        found = np.where(found > _LOWEST, found, _LOWEST)
        return found if x.ndim == 2 else found[0]


def dynesty(likelihood: Likelihood, seed: int) -> Found:
    """Static nested sampling with 500 live points, one point at a time."""
    module: Any = importlib.import_module("dynesty")
    generator = np.random.default_rng(seed)
    sampler = module.NestedSampler(
        likelihood, likelihood.transform, likelihood.dim, nlive=_LIVE, rstate=generator
    )  # fmt: skip
    sampler.run_nested(print_progress=False)
    found = sampler.results
    weights = torch.tensor(found.importance_weights())
    return float(found.logz[-1]), float(found.logzerr[-1]), torch.tensor(found.samples), weights


def nautilus(likelihood: Likelihood, seed: int) -> Found:
    """Importance nested sampling with neural bounds, 2000 live points; its error of log Z is that of as many
    independent draws as are effective."""
    module: Any = importlib.import_module("nautilus")
    sampler = module.Sampler(
        likelihood.transform, likelihood, n_dim=likelihood.dim, vectorized=True, pass_dict=False, seed=seed
    )
    sampler.run(verbose=False)
    x, log_w, _ = sampler.posterior()
    return float(sampler.log_z), float(sampler.n_eff) ** -0.5, torch.tensor(x), torch.tensor(np.exp(log_w))


def pocomc(likelihood: Likelihood, seed: int) -> Found:
    """Sequential Monte Carlo whose moves are preconditioned by a normalising flow, trained on its particles."""
    module: Any = importlib.import_module("pocomc")
    sampler = module.Sampler(
        module.Prior(likelihood.marginals()), likelihood, vectorize=True, random_state=seed, dynamic=True
    )
    sampler.run(progress=False)
    x, weights, _, _ = sampler.posterior()
    log_z, error = sampler.evidence()
    return float(log_z), float(error), torch.tensor(x), torch.tensor(weights)


PEERS = {"dynesty": dynesty, "nautilus": nautilus, "pocomc": pocomc}
