"""The digits problems: a model of scikit-learn's digits, three rewards, and their exactly tilted laws by importance
sampling."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import sdecontrol as sc
from sdecontrol.cli.demo_run import FULL, demo_models
from sdecontrol.evaluation.estimates import Estimate, effective_sample_size, log_mean_weight, mean_estimate, pareto_k
from sdecontrol.files.bundles import register_bundle
from sdecontrol.library.cache import read_cached, write_cached
from sdecontrol.library.digits import DIGIT_SHAPE, digits

__all__ = [
    "ALPHAS",
    "CORE",
    "MEASURED",
    "REWARDS",
    "TIME_STEPS",
    "Tilt",
    "classes_of",
    "conditional_model",
    "digits_problem",
    "frontier",
    "pool",
    "properties",
]

VERSION = 1
PIXELS = math.prod(DIGIT_SHAPE)
LABEL = 3
STEPS = 50
#: noising times ``(1 - k/K)^1.5``, finer towards the data
TIME_STEPS = [1 - (1 - k / STEPS) ** 1.5 for k in range(STEPS + 1)]
#: reward -> temperatures, the one whose cells are filled first in front
ALPHAS = {"class": (1.0, 2.0, 4.0), "ink": (1.2, 2.0, 0.9), "zip": (2.0, 1.5, 3.0)}
CORE = 2  # of these: the temperatures of the core rows
REWARDS = {
    "class": f"log p({LABEL} | x) of a classifier",
    "ink": "half the sum of all pixels (linear)",
    "zip": "minus the bytes of zlib at level 9 for the image in 16 grey levels, one byte a pixel (a black box)",
}
MEASURED = 4096  # samples of a method that are measured, where they are cheap
_POOL, _POOL_SEED = 2**17, 77
_POOL_KIND = register_bundle("digits pool")
_NEIGHBOURS = 128  # samples among which nearest neighbours are sought
_TARGET = 8192  # samples of the tilted law that others are compared with
TRUSTED = 200.0  # effective samples from which on the importance-sampled law is drawn as exact


class _Flat(nn.Module):
    """A model of images as one of vectors, which all methods take."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return self.model(x.reshape(-1, *DIGIT_SHAPE), s).flatten(1)


class _FlatClassifier(nn.Module):
    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x.reshape(-1, *DIGIT_SHAPE))


def zip_reward(x: Tensor) -> Tensor:
    """Minus the compressed size in bytes, ``(batch,)``; no gradient."""
    levels = ((x.detach().clamp(-1, 1) + 1) * 7.5).round().to(torch.uint8).cpu().numpy()
    return torch.tensor([-float(len(zlib.compress(row.tobytes(), 9))) for row in levels], dtype=x.dtype)


@cache
def _models() -> tuple[nn.Module, nn.Module]:
    found = demo_models(0, FULL)
    return _Flat(found.noise), _FlatClassifier(found.classifier)


def digits_problem(reward: str, alpha: float) -> sc.ControlProblem:
    """One of the problems, on vectors ``(64,)``. Trains the model (70 CPU-seconds) where it is not in the cache."""
    noise, classifier = _models()
    functions: dict[str, Any] = {
        "class": sc.LogProb(classifier, LABEL),
        "ink": sc.Linear(torch.full((PIXELS,), 0.5)),
        "zip": zip_reward,
    }
    sde = sc.generative_sde(noise, sc.VP(), prediction="noise", shape=(PIXELS,))
    sde.default_scheme = "euler"  # the pool's, and of all cells
    return sc.ControlProblem(sde, reward=functions[reward], alpha=alpha)


def conditional_model(reward: str) -> nn.Module:
    """``model(x, s, y)`` on vectors, trained on the labelled digits as the unconditional one is on all of them (100
    CPU-seconds).

    Raises:
        ValueError: a reward that is not of a label.
    """
    if reward != "class":
        raise ValueError(f"classifier-free guidance is towards a label; the reward {reward!r} has none.")
    images, labels = digits()
    return sc.fit_score(
        images.flatten(1), sc.VP(), "noise", iterations=FULL.model_iterations, condition=labels, seed=13, progress=False
    )


@cache
def pool() -> Tensor:
    """``(131072, 64)`` samples of the untuned chain."""
    name = f"digits-pool-{VERSION}-{_POOL}-{STEPS}"
    found = read_cached(name, _POOL_KIND)
    if found is not None:
        return found[0]["samples"]
    problem = digits_problem("ink", 1.0)
    paths = sc.simulate(problem, _POOL, time_steps=TIME_STEPS, seed=_POOL_SEED, keep="end")
    write_cached(name, _POOL_KIND, {"samples": paths.samples}, {})
    return paths.samples


@cache
def _training_images() -> Tensor:
    return digits()[0].flatten(1)


# ---------------------------------------------------------------------------------------- the exact law


@dataclass(frozen=True)
class Tilt:
    """The law ``p_0 exp(r/alpha)/Z`` of the chain's end, by self-normalised importance sampling; all errors by the
    delta method."""

    alpha: float
    log_w: Tensor
    reward: Estimate
    kl: Estimate
    log_z: Estimate
    effective: float
    tail: float

    @property
    def trusted(self) -> bool:
        return self.effective >= TRUSTED and self.tail < 0.7

    @staticmethod
    def of(rewards: Tensor, alpha: float) -> Tilt:
        log_w = rewards.double() / alpha
        log_z = log_mean_weight(log_w)
        share = (log_w - log_z.value).exp()  # of mean 1
        n = len(log_w)
        mean = float((share * log_w).mean())
        spread = share * (log_w - mean)
        reward = Estimate(alpha * mean, alpha * float(spread.std()) / math.sqrt(n))
        kl = Estimate(mean - log_z.value, float((spread - share).std()) / math.sqrt(n))
        return Tilt(alpha, log_w, reward, kl, log_z, n * effective_sample_size(log_w), pareto_k(log_w))

    def resampled(self, n: int, seed: int, part: slice = slice(None)) -> Tensor:
        """Indices ``(n,)`` into that part of the pool, in proportion to the weights."""
        generator = torch.Generator().manual_seed(seed)
        return torch.multinomial(self.log_w[part].softmax(0), n, replacement=True, generator=generator)

    def as_dict(self) -> dict[str, Any]:
        numbers = {
            k: {"value": e.value, "stderr": e.stderr}
            for k, e in (("reward", self.reward), ("kl", self.kl), ("log_z", self.log_z))
        }
        return {"alpha": self.alpha, **numbers, "effective": self.effective, "pareto_k": self.tail}


@cache
def pool_rewards(reward: str) -> Tensor:
    """The reward at the pool's samples."""
    with torch.no_grad():
        problem = digits_problem(reward, 1.0)
        return torch.cat([problem.reward(x) for x in pool().split(8192)])


def frontier(reward: str, points: int = 61) -> list[dict[str, Any]]:
    """Reward and KL of the tilted laws at falling temperatures, as far as importance sampling can be trusted."""
    rewards = pool_rewards(reward)
    out = []
    for alpha in torch.logspace(1.5, -1.5, points, dtype=torch.float64).mul(float(rewards.std())).tolist():
        tilt = Tilt.of(rewards, alpha)
        if not tilt.trusted:
            break
        out.append(tilt.as_dict())
    return out


# ---------------------------------------------------------------------------------------- what samples are like


def classes_of(x: Tensor) -> Tensor:
    """Most probable class of samples ``(n, 64)`` by the oracle."""
    with torch.no_grad():
        return torch.cat([_models()[1](part).argmax(1) for part in x.split(8192)])


def _nearest_other(x: Tensor) -> Estimate:
    """Mean distance to the nearest other one among 128 samples; over groups of so many."""
    groups = x[: len(x) // _NEIGHBOURS * _NEIGHBOURS].unflatten(0, (-1, _NEIGHBOURS))
    distances = torch.cdist(groups, groups).diagonal_scatter(torch.full(groups.shape[:2], torch.inf), dim1=1, dim2=2)
    return mean_estimate(distances.amin(2).mean(1))


def _to_training(x: Tensor) -> Tensor:
    return torch.cat([torch.cdist(part, _training_images()).amin(1) for part in x.split(8192)])


def _number(e: Estimate) -> dict[str, float | None]:
    return {"value": e.value, "stderr": e.stderr if math.isfinite(e.stderr) else None}


def properties(x: Tensor, tilt: Tilt) -> dict[str, Any]:
    """Coverage and diversity of samples ``(n, 64)``, n a multiple of 128, and their distance to the tilted law."""
    shares = torch.bincount(classes_of(x), minlength=10).double() / len(x)
    target = pool()[: _POOL // 2][tilt.resampled(_TARGET, 1, slice(0, _POOL // 2))]
    return {
        "n": len(x),
        "class_shares": shares.tolist(),
        "class_entropy": float(torch.special.entr(shares).sum()),
        "nearest_other": _number(_nearest_other(x)),
        "nearest_training": _number(mean_estimate(_to_training(x))),
        "sliced_wasserstein": sc.metrics.sliced_wasserstein(x, target, directions=200),
    }


def properties_of_tilt(tilt: Tilt) -> dict[str, Any]:
    """The same of the tilted law itself: samples of the pool's second half against those of the first."""
    second = slice(_POOL // 2, _POOL)
    index = tilt.resampled(MEASURED, 2, second)
    found = properties(pool()[second][index], tilt)
    # a resampled image is no neighbour of its copies: 128 different ones at a time
    groups = [_different(tilt, 100 + i) for i in range(16)]
    found["nearest_other"] = _number(_nearest_other(pool()[torch.cat(groups)]))
    return found


def _different(tilt: Tilt, seed: int) -> Tensor:
    index = tilt.resampled(64 * _NEIGHBOURS, seed)
    _, where = torch.unique(index, return_inverse=True)
    first = torch.full((int(where.max()) + 1,), len(index)).scatter_reduce(0, where, torch.arange(len(index)), "amin")
    return index[first.sort().values[:_NEIGHBOURS]]
