"""Amortisation: one control for a family of posteriors, against a particle sampler run anew for each."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import sdecontrol as sc
from sdecontrol.evaluation.tempered_solution import TemperedSolution
from sdecontrol.randomness import Place, derive_seed

from .cells import store, versions

RESULT = Path(__file__).parent / "results" / "gibbs_amortised.json"
TIME_STEPS, POSTERIORS, SAMPLES = 50, 16, 4096
_NOISE = 0.3


def log_joint(x: Tensor, y: Tensor) -> Tensor:
    """``log p(x) p(y | x)`` of x ~ N(0, I) in three dimensions, observed as ``y = (x1^2 + x2, x3 - x1) + 0.3 noise``,
    ``(batch,)``: two modes where y1 is large, one where it is not."""
    mean = torch.stack((x[:, 0].square() + x[:, 1], x[:, 2] - x[:, 0]), 1)
    prior = -0.5 * x.square().sum(1) - 1.5 * math.log(2 * math.pi)
    misfit = ((y - mean) / _NOISE).square().sum(1)
    return prior - 0.5 * misfit - math.log(2 * math.pi * _NOISE**2)


def observations(n: int) -> Tensor:
    """``(n, 2)`` drawn from their law, from torch's global generator."""
    x = torch.randn(n, 3)
    return torch.stack((x[:, 0].square() + x[:, 1], x[:, 2] - x[:, 0]), 1) + _NOISE * torch.randn(n, 2)


def _of_control(solution: Any, y: Tensor, seed: int) -> dict[str, float]:
    began = time.process_time()
    _, log_w = solution.weighted_sample(SAMPLES, seed=seed, condition=y.expand(SAMPLES, 2))
    spent = time.process_time() - began
    w = log_w.double()
    ess = float((2 * w.logsumexp(0) - (2 * w).logsumexp(0)).exp())
    log_z = float(w.logsumexp(0)) - math.log(SAMPLES)
    return {
        "log_z": log_z,
        "elbo": float(w.mean()),
        "effective": ess,
        "evaluations": float(SAMPLES),
        "cpu_seconds": spent,
    }


def _of_particles(y: Tensor, seed: int) -> dict[str, float]:
    began, calls = time.process_time(), [0]

    def counted(x: Tensor) -> Tensor:
        calls[0] += len(x)
        return log_joint(x, y.expand(len(x), 2))

    problem = sc.gibbs_problem(counted, 3, scale=1.25, centre=0.0, seed=seed)
    solution = sc.solve(problem, sc.TemperedSMC(SAMPLES), seed=seed, progress=False)
    assert isinstance(solution, TemperedSolution)
    found = solution.run(4, derive_seed(seed, Place.OUTSIDE, 1))
    log_w = (found.log_weights + found.log_z.unsqueeze(1)).flatten()
    ess = float((2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp())
    return {
        "log_z": float(found.log_z.logsumexp(0)) - math.log(len(found.log_z)),
        "effective": ess,
        "evaluations": float(calls[0]),
        "cpu_seconds": time.process_time() - began,
    }


def amortised(
    cpu_seconds: Annotated[float, typer.Option(min=1, help="Of training.")] = 120.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """One control for a family of posteriors: cost and quality per posterior, against particles run anew for each.

    Example: python -m benchmarks amortised --cpu-seconds 120
    """
    torch.set_num_threads(1)
    problem = sc.gibbs_problem(log_joint, 3, scale=1.25, centre=0.0, condition=observations, seed=seed)
    settings: dict[str, Any] = {"time_steps": TIME_STEPS, "seed": seed, "progress": False}
    sc.solve(problem, sc.LogVariance(), iterations=2, **settings)
    began = time.process_time()
    sc.solve(problem, sc.LogVariance(), iterations=10, **settings)
    iterations = max(20, int(cpu_seconds / ((time.process_time() - began) / 10)))
    began = time.process_time()
    solution = sc.solve(problem, sc.LogVariance(), iterations=iterations, **settings)
    training = time.process_time() - began
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, Place.OUTSIDE, 2))
        family = observations(POSTERIORS)
    rows = []
    for i, y in enumerate(family):
        control, particles = (
            _of_control(solution, y, derive_seed(seed, Place.OUTSIDE, 3, i)),
            _of_particles(y, derive_seed(seed, Place.OUTSIDE, 4, i)),
        )
        rows.append({"y": y.tolist(), "control": control, "particles": particles})
        print(
            f"y = ({y[0]:+.2f}, {y[1]:+.2f}): log Z {control['log_z']:.3f} (particles {particles['log_z']:.3f}), ELBO "
            f"{control['elbo']:.3f}, ESS {control['effective'] / SAMPLES:.2f}, {control['cpu_seconds']:.2f} CPU-s "
            f"({particles['cpu_seconds']:.2f})",
            flush=True,
        )
    store(
        RESULT,
        {
            "training_cpu_seconds": training,
            "training_evaluations": iterations * 256,
            "iterations": iterations,
            "seed": seed,
            "samples": SAMPLES,
            "posteriors": rows,
            "versions": versions(),
            "command": f"python -m benchmarks amortised --cpu-seconds {cpu_seconds:g} --seed {seed}",
        },
    )
    print(json.dumps(summary(rows, training, iterations), indent=1))


def summary(rows: list[dict[str, Any]], training: float, iterations: int) -> dict[str, float]:
    """Medians over the posteriors, and after how many of them training has paid for itself."""
    per = {
        who: sorted(r[who][what] / r[who]["effective"] for r in rows)[len(rows) // 2]
        for who in ("control", "particles")
        for what in ("evaluations",)
    }
    seconds = {who: sorted(r[who]["cpu_seconds"] / r[who]["effective"] for r in rows)[len(rows) // 2] for who in per}
    errors = sorted(abs(r["control"]["log_z"] - r["particles"]["log_z"]) for r in rows)
    gained = 1000 * (seconds["particles"] - seconds["control"])
    evaluations = 1000 * (per["particles"] - per["control"])
    return {
        "evaluations per effective sample, control": per["control"],
        "evaluations per effective sample, particles": per["particles"],
        "CPU-ms per effective sample, control": 1000 * seconds["control"],
        "CPU-ms per effective sample, particles": 1000 * seconds["particles"],
        "median difference of log Z": errors[len(errors) // 2],
        "largest difference of log Z": errors[-1],
        "posteriors of 1000 samples after which training has paid, in evaluations": iterations * 256 / evaluations
        if evaluations > 0
        else math.inf,
        "the same in CPU-seconds": training / gained if gained > 0 else math.inf,
    }
