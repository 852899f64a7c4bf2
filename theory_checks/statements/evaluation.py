"""Estimates, distances and densities as their users state them, against closed forms."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy import stats

import sdecontrol as sc
from sdecontrol.evaluation.estimates import (
    bridge_log_z,
    effective_sample_size,
    log_mean_weight,
    mean_estimate,
    pareto_k,
)
from sdecontrol.evaluation.sequence_metrics import kmer_distance, kmer_spectrum, total_variation
from sdecontrol.problems.learned_reward import LearnedReward
from sdecontrol.processes.finite import FiniteLaw

from ..cases import tensor
from ..registry import Measurement, Setting, check, compare, within
from .particles import agrees

Lines = Iterator[Measurement]
METRICS = "sdecontrol.evaluation.metrics"


@check(
    "estimates-of-weights",
    "MATH 2: weights",
    kind="statistical",
    implements=[
        "sdecontrol.evaluation.estimates.log_mean_weight",
        "sdecontrol.evaluation.estimates.bridge_log_z",
        "sdecontrol.evaluation.estimates.pareto_k",
        "sdecontrol.evaluation.estimates.effective_sample_size",
    ],
    controls=["log Z off by 0.1", "tail index off by 0.3", "standard errors halved"],
)
def estimates(setting: Setting, defect: str) -> Lines:
    """Of log-normal weights exp(s xi) the log mean is s^2/2, the effective fraction exp(-s^2); from both sides of two
    Gaussians the bridge has the ratio of their constants; the tail of Pareto weights has its index; and standard errors
    are those of 300 repetitions."""
    rng, s = setting.rng(171), 0.7
    off = 0.1 if defect.startswith("log Z") else 0.0
    log_w = tensor(s * rng.normal(size=40_000))
    yield from agrees("log mean weight", log_mean_weight(log_w), 0.5 * s**2 + off, 0.01)
    yield within("effective fraction", abs(effective_sample_size(log_w) - math.exp(-(s**2))), 0.02)
    # proposal N(0, 1), target e^0.8 N(0.5, 0.8^2)
    log_ratio = lambda x: 0.8 + stats.norm.logpdf(x, 0.5, 0.8) - stats.norm.logpdf(x)  # noqa: E731
    reverse = tensor(log_ratio(rng.normal(size=8000)))
    forward = tensor(log_ratio(0.5 + 0.8 * rng.normal(size=8000)))
    yield from agrees("bridge", bridge_log_z(reverse, forward), 0.8 + off, 0.02)
    for k in (0.2, 0.5, 0.9):
        heavy = tensor(-k * np.log(rng.uniform(size=40_000)))
        want = k + (0.3 if defect.startswith("tail") else 0.0)
        yield within(f"tail index of Pareto weights, {k}", abs(pareto_k(heavy) - want), 0.12)
    scale = 2.0 if defect.startswith("standard") else 1.0
    for name, estimate, value in (
        ("mean", lambda v: mean_estimate(v), 0.0),
        ("log mean weight", lambda v: log_mean_weight(0.3 * v), 0.045),
    ):
        scores = [(e.value - value) / e.stderr for e in (estimate(tensor(rng.normal(size=400))) for _ in range(300))]
        yield within(f"spread of z-scores less 1, {name}", abs(scale * float(np.std(scores)) - 1), 0.15)


@check(
    "distances-of-samples",
    "metrics",
    kind="statistical",
    implements=[
        f"{METRICS}.{name}"
        for name in ("wasserstein", "sinkhorn", "sliced_wasserstein", "mmd", "energy_wasserstein", "mode_coverage")
    ],
    controls=["samples moved by 10 %", "weights left out", "another width of the kernel"],
)
def distances(setting: Setting, defect: str) -> Lines:
    """A set moved by a vector v is |v| away in every Wasserstein distance, and |v| E|cos| on slices; weighted samples
    are those that their weights make; MMD of two Gaussians and the energies' distance are in closed form; shares of
    modes are counted; token laws and spectra by hand."""
    rng = setting.rng(172)
    x, v = tensor(rng.normal(size=(300, 2))), tensor([0.6, -0.8])
    y = x + v * (1.1 if defect.startswith("samples") else 1.0)
    yield compare("wasserstein of a moved set", sc.metrics.wasserstein(x, y), 1.0, 1e-8)
    yield within("sinkhorn of a moved set", abs(sc.metrics.sinkhorn(x[:80], y[:80], 2.0) - 1.0), 1e-4)
    yield within(
        "sliced, of a moved set", abs(sc.metrics.sliced_wasserstein(x, y, directions=2000) - 2 / math.pi), 0.02
    )
    w = torch.where(x[:, 0] > 0, 0.0, -math.inf).double()
    picked = x[x[:, 0] > 0]
    given = None if defect.startswith("weights") else w
    yield within("wasserstein to the samples that weights leave", sc.metrics.wasserstein(x, picked, given), 1e-6)
    n, s = 3000, 0.9 * (1.5 if defect.startswith("another") else 1.0)
    a, b = tensor(rng.normal(size=(n, 2))), tensor(rng.normal(size=(n, 2))) + v
    kernel = lambda d2: 0.81 / (0.81 + 2) * math.exp(-0.5 * d2 / (0.81 + 2))  # noqa: E731
    yield within("mmd of two Gaussians", abs(sc.metrics.mmd(a, b, s) - 2 * (kernel(0.0) - kernel(1.0))), 0.012)
    energy = lambda z: -z[:, 0]  # noqa: E731
    yield compare("distance of energies", sc.metrics.energy_wasserstein(x, y, energy), 0.6, 1e-8)
    modes = tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    spots = torch.cat((modes[0] + 0.1 * x[:60], modes[1] + 0.1 * x[:30], modes[0].expand(10, 2) + 50))
    found = sc.metrics.mode_coverage(spots, modes, radius=2.0)
    yield compare("shares of modes", found.shares, [0.6, 0.3, 0.0])
    yield compare("modes hit", float(found.hit), 2.0, 0.0)
    law = FiniteLaw(tensor([0.5, 0.3, 0.2]))
    tokens = torch.tensor([0] * 5 + [1] * 5)[:, None]
    yield compare("total variation of tokens", total_variation(tokens, law), 0.2)
    words = torch.tensor([[0, 1, 0], [1, 1, 0]])
    yield compare("spectrum of pairs", kmer_spectrum(words, 2, 2), [0.0, 0.25, 0.5, 0.25])
    yield compare("distance of spectra", kmer_distance(words, words[:1], 2, 2), 0.25)


@check(
    "densities-of-parameters",
    "MATH 6: densities",
    implements=["sdecontrol.gibbs_problem", "sdecontrol.problems.parameters.Parameters.constrained"],
    controls=["Jacobian left out", "prior left out", "support off by 5 %"],
)
def parameters(setting: Setting, defect: str) -> Lines:
    """A density in its user's parameters is, in unconstrained coordinates, the same measure: log rho(x) = log p(v) +
    log |dv/dx|, with exp, the logistic function and stick breaking as transforms and the priors added; of functions of
    torch's and numpy's arrays, one point at a time too; and its integral is kept."""
    rng = setting.rng(173)
    x = rng.normal(size=(5, 3))
    low, high = 1.0, 3.0 * (1.05 if defect.startswith("support") else 1.0)
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    prior = {
        "mu": torch.distributions.Normal(tensor(0.0), tensor(2.0)),
        "tau": torch.distributions.LogNormal(tensor(0.1), tensor(0.5)),
        "p": torch.distributions.Uniform(tensor(low), tensor(high)),
    }
    mu, tau, p = x[:, 0], np.exp(x[:, 1]), 1 + 2 * sigmoid(x[:, 2])
    likelihood = -0.5 * (mu - 1) ** 2 / tau**2 - np.log(tau) - p
    jacobian = x[:, 1] + np.log(2 * sigmoid(x[:, 2]) * sigmoid(-x[:, 2]))
    priors = stats.norm.logpdf(mu, 0, 2) + stats.lognorm.logpdf(tau, 0.5, scale=math.exp(0.1)) - math.log(2)
    want = likelihood + (0.0 if defect.startswith("prior") else priors)
    want = want + (0.0 if defect.startswith("Jacobian") else jacobian)
    by_torch = lambda v: -0.5 * (v["mu"] - 1) ** 2 / v["tau"] ** 2 - v["tau"].log() - v["p"]  # noqa: E731
    by_numpy = lambda v: -0.5 * (v["mu"] - 1) ** 2 / v["tau"] ** 2 - np.log(v["tau"]) - v["p"]  # noqa: E731
    one = lambda v: float(-0.5 * (v["mu"] - 1) ** 2 / v["tau"] ** 2 - np.log(v["tau"]) - v["p"])  # noqa: E731
    ways: tuple[tuple[str, Any, dict[str, Any]], ...] = (
        ("torch", by_torch, {}),
        ("numpy", by_numpy, {"arrays": "numpy"}),
        ("one point", one, {"vectorised": False, "arrays": "numpy"}),
    )
    for name, function, options in ways:
        problem: Any = sc.gibbs_problem(log_likelihood=function, prior=prior, scale=1.0, centre=0.0, seed=0, **options)
        order = [problem.parameters.labels.index(label) for label in ("mu", "tau", "p")]
        coordinates = np.empty_like(x)
        coordinates[:, order] = x
        yield compare(f"log density, {name}", problem.density(tensor(coordinates)), want, 1e-9)
        stated = problem.as_stated(tensor(coordinates))
        yield compare(f"parameters, {name}", stated["tau"], tau, 1e-9)
        yield compare(f"coordinates of them, {name}", problem.coordinates_of(stated), coordinates, 1e-7)
    yield from _simplex(defect)


def _simplex(defect: str) -> Lines:
    """Dirichlet(2, 3, 4) by its density: the integral over stick-breaking coordinates is that over the simplex."""
    powers = tensor([1.0, 2.0, 3.0])
    problem: Any = sc.gibbs_problem(
        lambda v: (powers * v.log()).sum(1), 3, support="simplex", scale=1.0, centre=0.0, dtype=torch.float64, seed=0
    )
    line = torch.linspace(-12, 12, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    total = problem.density(grid).exp().sum() * float(line[1] - line[0]) ** 2
    want = math.gamma(2) * math.gamma(3) * math.gamma(4) / math.gamma(9)
    if defect.startswith("support"):
        want = 1.05 * want
    yield compare("log of the Dirichlet integral", math.log(float(total)), math.log(want), 1e-6)


@check(
    "pilot-runs",
    "MATH 6: densities",
    kind="statistical",
    implements=["sdecontrol.gibbs_problem", "sdecontrol.problems.pilot.run_pilot"],
    controls=["centre off by two deviations", "scale off by a factor of 4"],
)
def pilot(setting: Setting, defect: str) -> Lines:
    """Where nothing is said of a density its pilot run finds its middle and width: a reference's centre within one
    standard deviation of a Gaussian's mean and a scale between its own and three times that, however far it is and
    however unequal its widths are; its score is autograd's, or the user's own."""
    mean, sd = np.array([40.0, -3.0]), np.array([0.02, 7.0])
    law = torch.distributions.Normal(tensor(mean), tensor(sd))
    log_density = lambda x: law.log_prob(x).sum(1)  # noqa: E731
    problem = sc.gibbs_problem(log_density, 2, dtype=torch.float64, seed=setting.seed).settle()
    centre, scale = problem.centre.numpy(), problem.scale.numpy()
    centre = centre + 2 * sd if defect.startswith("centre") else centre
    scale = scale / 4 if defect.startswith("scale") else scale
    yield within("centre, in standard deviations", float(np.abs((centre - mean) / sd).max()), 1.0)
    yield within("smallest scale, 1 less its ratio", 1 - float((scale / sd).min()), 0.1)
    yield within("largest scale, its ratio", float((scale / sd).max()), 4.0)
    x = tensor(mean + sd * setting.rng(174).normal(size=(4, 2)))
    want = -(x - tensor(mean)) / tensor(sd) ** 2
    scored: Any = sc.gibbs_problem(
        lambda x: log_density(x.detach()), 2, score=lambda x: -(x - tensor(mean)) / tensor(sd) ** 2, scale=sd.tolist(),
        centre=mean.tolist(), dtype=torch.float64,
    )  # fmt: skip
    for name, made in (("autograd's", problem), ("the user's", scored)):
        yield compare(f"score, {name}", made.density.gradient(x), want, 1e-9)


@check(
    "rewards-of-parts",
    "[9], Section 7.3",
    implements=[
        "sdecontrol.WeightedRewards",
        "sdecontrol.BlackBox",
        "sdecontrol.OneHot",
        "sdecontrol.problems.learned_reward.LearnedReward",
    ],
    controls=["a weight off by 5 %", "variance for the deviation"],
)
def rewards(setting: Setting, defect: str) -> Lines:
    """Sums of weighted rewards, black boxes of single samples or batches on several threads, rewards of one-hot tokens,
    and bounds of an ensemble, mean -+ beta times the deviation of its members, are these numbers."""
    x = setting.rng(175).normal(size=(5, 2))
    weight = 2.1 if defect.startswith("a weight") else 2.0
    box = sc.BlackBox(lambda v: float(np.sin(v.numpy()).sum()), per_sample=True, workers=2)
    batch = sc.BlackBox(lambda v: (v.numpy() ** 2).sum(1))
    reward = sc.WeightedRewards({"a": (weight, box), "b": (-0.5, batch), "c": lambda y: y[:, 0]})
    want = 2 * np.sin(x).sum(1) - 0.5 * (x**2).sum(1) + x[:, 0]
    yield compare("weighted rewards", reward(tensor(x)), want, 1e-9)
    yield compare("their parts", reward.parts(tensor(x))[:, 0], np.sin(x).sum(1), 1e-9)
    box.close()
    batch.close()
    tokens = torch.tensor([[0, 2], [1, 1]])
    table = tensor(setting.rng(176).normal(size=(2, 3)))
    hot = sc.OneHot(lambda p: (p * table).sum((1, 2)), 3, dtype=torch.float64)
    yield compare("reward of tokens", hot(tokens), [float(table[0, 0] + table[1, 2]), float(table[0, 1] + table[1, 1])])
    members = []
    for slope in (0.5, 1.0, 2.5):
        layer = torch.nn.Linear(2, 1, bias=False).double()
        layer.weight.data = tensor([[slope, -1.0]])
        members.append(torch.nn.Sequential(layer, torch.nn.Flatten(0)))
    ensemble = LearnedReward(members, 0.3, 2.0)
    each = np.stack([0.3 + 2.0 * (s * x[:, 0] - x[:, 1]) for s in (0.5, 1.0, 2.5)])
    spread = each.var(0, ddof=1) if defect.startswith("variance") else each.std(0, ddof=1)
    yield compare("mean of an ensemble", ensemble(tensor(x)), each.mean(0), 1e-9)
    yield compare("its lower bound", ensemble.pessimistic(1.5)(tensor(x)), each.mean(0) - 1.5 * spread, 1e-6)
    yield compare("its upper bound", ensemble.optimistic(0.5)(tensor(x)), each.mean(0) + 0.5 * spread, 1e-6)
