"""Known rewards: a method on a task, and what it drew, held against the exact law of 8-mers."""

from __future__ import annotations

import itertools
import math
import time
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import sdecontrol as sc
from sdecontrol.counting import Calls, counting
from sdecontrol.evaluation.solution import Solution
from sdecontrol.library.folding import paired_shares
from sdecontrol.library.sequences import SequenceTask

__all__ = ["FIXED", "TRAINED", "exact_law", "known_cell"]

#: of a row: of what is cheap to draw, and of what takes many paths or calls for each
SAMPLES = {"dna-8mer": (4096, 1024), "rna-utr": (1024, 128), "dna-enhancer": (256, 64)}
#: rows that train nothing; the recipe is in TRAINED
FIXED: dict[str, sc.Method | None] = {
    "untuned": None,
    "exact tilt": None,
    "best of 16": sc.BestOfN(16),
    "best of 256": sc.BestOfN(256),
    "SMC, 16 particles": sc.SMC(num_particles=16, twist="tweedie"),
}
TRAINED: dict[str, sc.Method] = {
    "log-variance": sc.LogVariance(),
    "soft-ppo": sc.SoftPPO(),
    "path-consistency": sc.PathConsistency(),
    "bridge-matching": sc.BridgeMatching(),
    "value guidance, soft Q": sc.ValueGuidance("soft-q"),
    "reward-backprop": sc.RewardBackprop(),
    "no KL, no baseline, one update": sc.Reinforce(baseline="none"),
}
_NO_KL = 1e-3  # of the temperature, where the KL is to cost nothing


@lru_cache
def exact_law(name: str = "dna-8mer") -> tuple[Tensor, Tensor, Tensor]:
    """All sequences of a short task, ``(4^L, L)``, their log-probabilities and activities, float64."""
    task = sc.library.sequence_task(name)
    x = torch.tensor(list(itertools.product(range(4), repeat=task.length)))
    return x, task.log_likelihood(x), task.reward(x).double()


def _total_variation(x: Tensor, log_q: Tensor) -> float:
    counts = torch.bincount((x * 4 ** torch.arange(7, -1, -1)).sum(1), minlength=len(log_q)).double()
    return float(0.5 * (counts / len(x) - log_q.exp()).abs().sum())


def _drawn(rows: int, log_q: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(log_q.exp(), rows, replacement=True, generator=generator)


def _best_of(n: int) -> Tensor:
    """The exact law of the best of n draws of 8-mers, log-probabilities."""
    _, log_p, r = exact_law()
    values, place = r.unique(return_inverse=True)
    mass = torch.zeros(len(values), dtype=torch.float64).index_add(0, place, log_p.exp())
    below = mass.cumsum(0) / mass.sum()
    best = below**n - torch.cat((below.new_zeros(1), below[:-1])) ** n
    return (best.clamp(min=1e-300) / mass).log()[place] + log_p


def known_cell(name: str, row: str, seconds: float, seed: int) -> dict[str, Any]:
    """A row of the table."""
    task = sc.library.sequence_task(name)
    problem, calls, began = task.problem(), Calls(), time.process_time()
    solution, trained = None, {}
    if row in TRAINED:
        with counting(calls):
            solution, trained = _trained(task, row, seconds, seed)
        spent = time.process_time() - began
        calls.reward_calls = int(calls.reward_calls * trained.pop("share"))
    elif FIXED[row] is not None:
        solution, spent = sc.solve(problem, FIXED[row], seed=seed, progress=False), 0.0
    else:
        spent = 0.0
    sampling, begun = Calls(), time.process_time()
    few = SAMPLES[name][int(row.startswith("SMC") or (row.startswith("best of") and task.length > 8))]
    with counting(sampling):
        x, numbers = _sampled(task, problem, row, solution, seed, few)
    numbers["milliseconds_a_sample"] = 1000 * (time.process_time() - begun) / len(x)
    return {
        **trained,
        "training_cpu_seconds": round(trained.get("training_cpu_seconds", spent), 1),
        "reward_calls": calls.reward_calls,
        "reward_calls_a_sample": _asked(row, sampling.reward_calls / len(x)),
        **numbers,
        **_judged(task, x),
    }


def _asked(row: str, counted: float) -> float:
    """Of a sample: a network and an enumeration ask for none."""
    if row in TRAINED or row in ("untuned", "exact tilt"):
        return 0.0
    return float(row.split()[-1]) if row.startswith("best of") else counted


def _trained(task: SequenceTask, row: str, seconds: float, seed: int) -> tuple[Solution, dict[str, Any]]:
    """As many iterations as fit, by the CPU time of a few."""
    alpha = _NO_KL * task.card.alpha if row.startswith("no KL") else None
    problem, method = task.problem(alpha), TRAINED[row]
    options: dict[str, Any] = {"batch_size": 256 if task.length == 8 else 64, "seed": seed, "progress": False}

    def spent_on(iterations: int) -> float:
        began = time.process_time()
        sc.solve(problem, method, iterations=iterations, **options)
        return time.process_time() - began

    spent_on(1)  # what is done once in a process
    first, tries = spent_on(2), 12 if task.length == 8 else 3
    whole = spent_on(2 + tries)
    each = max(0.5 * whole / (2 + tries), (whole - first) / tries)
    count = max(8, int((seconds - first) / each))
    began = time.process_time()
    solution = sc.solve(problem, method, iterations=count, **options)
    spent = time.process_time() - began
    # reward calls of the tries are not the method's
    share = count / (count + 5 + tries)
    return solution, {"iterations": count, "training_cpu_seconds": spent, "share": share}


def _sampled(
    task: SequenceTask, problem: sc.ControlProblem, row: str, solution: Solution | None, seed: int, n: int
) -> tuple[Tensor, dict[str, Any]]:
    """Samples of a row, with its KL, gap and effective share as far as they are known."""
    alpha, numbers, short = task.card.alpha, {}, task.length == 8
    points, log_p, r = exact_law() if short else torch.zeros(3, 0).double()
    log_z = float((log_p + r / alpha).logsumexp(0))
    log_q = log_p + r / alpha - log_z
    if row == "exact tilt":
        assert short
        x = points[_drawn(n, log_q, seed)]
        numbers = {"kl": float(log_q.exp() @ (log_q - log_p)), "gap": 0.0, "ess": 1.0, "log_z": log_z}
    elif row in TRAINED or row == "untuned":
        control = None if solution is None else solution.control
        with torch.no_grad():
            paths = sc.simulate(problem, n, control=control, seed=seed + 1000, keep="states")
        x, log_w = paths.samples, paths.log_weights().double()
        elbo, kl = float(log_w.mean()), float(paths.log_ratio().double().mean())
        ess = float((2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp()) / n
        estimate = float(log_w.logsumexp(0)) - math.log(n)
        known = log_z if short else estimate
        numbers = {"kl": kl, "gap": known - elbo, "ess": ess, "log_z": known}
        numbers["gap_error"] = float(log_w.std()) / math.sqrt(n)
    elif short and row.startswith("best of"):  # its law is known, and drawn from
        law = _best_of(int(row.split()[-1]))
        x = points[_drawn(n, law, seed)]
        numbers = {"kl": float(law.exp() @ (law - log_p)), "gap": float(law.exp() @ (law - log_q)), "ess": None}
    else:
        assert solution is not None
        x = solution.sample(n, seed=seed + 1000)
    if short:
        numbers["tv"] = _total_variation(x, log_q)
        numbers["tv_of_exact_draws"] = _total_variation(points[_drawn(n, log_q, 7)], log_q)
    return x, numbers


def _judged(task: SequenceTask, x: Tensor) -> dict[str, Any]:
    found: dict[str, Any] = {"samples": len(x), "unique_share": len(x.unique(dim=0)) / len(x)}
    r, natural = task.reward(x), task.naturalness(x[:1024])
    found |= {"activity": float(r.mean()), "activity_error": float(r.std()) / math.sqrt(len(r))}
    found |= {"kmer_correlation": natural.kmer_correlation, "log_likelihood": natural.log_likelihood}
    found |= {"natural_log_likelihood": natural.natural_log_likelihood}
    found["edit_diversity"] = sc.metrics.edit_diversity(x)
    found["best"] = task.decode(x[r.argsort(descending=True)[:2]])
    if task.name == "rna-utr":
        found["paired_share"] = sum(paired_shares(task.decode(x[:256]))) / len(x[:256])
    return found
