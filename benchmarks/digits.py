"""Digits: a pre-trained model tilted to three rewards by all methods, beside the exactly tilted law.

Each finished cell (reward, method, alpha, seed, and the CPU-seconds where something is trained) is a JSON file under
``benchmarks/results/digits/``; a cell that exists is not run again, so that a table is filled over several sessions.
Every cell runs in a process of its own.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import sdecontrol as sc
from sdecontrol.comparison.costs import Costs, measuring
from sdecontrol.evaluation.estimates import Estimate, effective_sample_size, log_mean_weight, mean_estimate
from sdecontrol.evaluation.evaluate import log_weights
from sdecontrol.evaluation.particle_solution import ParticleSolution
from sdecontrol.evaluation.solution import Solution
from sdecontrol.methods.base import suggested

from . import digits_problem as digit
from .cells import store, versions
from .digits_page import write_figures, write_page
from .timing import interleaved

RESULTS = Path(__file__).parent / "results" / "digits"
BATCH = 128
_SETTINGS: dict[str, Any] = {"time_steps": digit.TIME_STEPS, "batch_size": BATCH, "progress": False}
TILT = "exact tilt"
#: CPU-seconds of a cell in all: data, fits and training
BUDGET = 120.0
#: of the page's strips of images
SHOWN = 12


def _guided(**settings: Any) -> sc.SMC:
    return sc.SMC(32, independent=True, twist="tweedie", **settings)


def _classifier_free(reward: str, alpha: float) -> sc.Method:
    """A conditional model, trained on the data's labels; its weight is that of ``p(x) p(y | x)^(1/alpha)``."""
    return sc.ClassifierFreeGuidance(digit.conditional_model(reward), weight=1 / alpha - 1, label=digit.LABEL)


def _default(reward: str, alpha: float) -> sc.Method:
    """What ``recommend`` puts first."""
    return suggested(digit.digits_problem(reward, alpha), time_steps=digit.TIME_STEPS, batch_size=BATCH)[0].method


#: the default guidance in one network: its iterations take about 140 CPU-seconds
_DISTILLED = ("distilled", 1800)
#: in the order in which cells are filled; functions (of the reward's name and alpha) are for methods that train or
#: look at something of their own first
METHODS: dict[str, sc.Method | Callable[[str, float], sc.Method]] = {
    "default": _default,
    _DISTILLED[0]: sc.ValueGuidance("ratio"),
    "value-guidance, tweedie": sc.ValueGuidance("tweedie"),
    "classifier-guidance": sc.ClassifierGuidance(),
    "classifier-free-guidance": _classifier_free,
    "path-integral-guidance": sc.PathIntegralGuidance(num_paths=64),
    "smc, tweedie twist": _guided(),
    "smc, tweedie guided": _guided(proposal=sc.ValueGuidance("tweedie")),
    "best-of-4": sc.BestOfN(4),
    "best-of-16": sc.BestOfN(16),
    "best-of-16, softmax": sc.BestOfN(16, selection="softmax"),
    "bridge-matching": sc.BridgeMatching(anchor=False),
    "bridge-matching, anchored": sc.BridgeMatching(paths="reference", steps=10),
    "reinforce-adjoint-matching": sc.BridgeMatching(target="reinforce", steps=10),
    "efficient-adjoint-matching": sc.BridgeMatching(target="adjoint", steps=10),
    "diffusion-nft": sc.BridgeMatching(target="reinforce", path_cost=False, steps=10),
    "particle-matching, anchored": sc.ParticleMatching(num_particles=1024, steps=10),
    "reward-backprop": sc.RewardBackprop(),
    "adjoint-matching, plain": sc.AdjointMatching(zero_variance=False),
    "soft-ppo": sc.SoftPPO(),
    "log-variance": sc.LogVariance(),
    "cross-entropy": sc.CrossEntropy(trust_region=1.0),
    "value-guidance, monte-carlo": sc.ValueGuidance("monte-carlo"),
    "socm": sc.SOCM(),
    "adjoint-matching": sc.AdjointMatching(),
    "path-consistency": sc.PathConsistency(),
    "reward-weighted-mle": sc.RewardWeightedMLE(),
    "reinforce": sc.Reinforce(),
    "value-guidance, soft-q": sc.ValueGuidance("soft-q"),
}
#: samples that are measured, where one costs more than others
_FEWER = {"path-integral-guidance": 128, "smc, tweedie twist": 512, "smc, tweedie guided": 512, "best-of-16": 1024}
_FEWER["best-of-16, softmax"] = _FEWER["best-of-4"] = 1024


# ---------------------------------------------------------------------------------------- one cell


def _iterations(problem: sc.ControlProblem, method: sc.Method, budget: float) -> int:
    """How many iterations the budget pays for, from runs of two and of six of them."""

    def seconds(iterations: int) -> float:
        began = time.process_time()
        sc.solve(problem, method, iterations=iterations, seed=9, **_SETTINGS)
        return time.process_time() - began

    seconds(1)
    few, more = seconds(2), seconds(6)
    each = max((more - few) / 4, more / 60)
    return max(5, int((budget - few) / each) + 2)


def _is_trained(label: str) -> bool:
    found = METHODS[label]
    return found.default_iterations > 0 if isinstance(found, sc.Method) else label != "classifier-free-guidance"


def _against_untuned(solution: Solution, n: int, seconds: float, few: bool) -> float:
    """CPU-seconds of a sample over those of the untuned model's; ``n`` samples took so many seconds."""
    plain = partial(sc.simulate, solution.problem, 1024, time_steps=digit.TIME_STEPS, seed=1, keep="end")
    if few:
        return seconds / n / (interleaved({"plain": plain}, 1)["plain"][0] / 1024)
    found = interleaved({"own": partial(solution.sample, 1024, 1), "plain": plain}, 3)
    return sorted(a / b for a, b in zip(found["own"], found["plain"]))[1]


def _together(*parts: Costs) -> dict[str, float]:
    """Of pieces of work that were measured one by one."""
    found = [asdict(p) for p in parts]
    return {k: (max if k == "memory" else sum)(f[k] for f in found) for k in found[0]}


def run_cell(reward: str, label: str, alpha: float, seed: int, budget: float, iterations: int | None) -> dict[str, Any]:
    """Train for the budget (where the method trains), and measure samples against the tilted law."""
    torch.set_num_threads(1)
    found, problem = METHODS[label], digit.digits_problem(reward, alpha)
    tilt = digit.Tilt.of(digit.pool_rewards(reward), alpha)
    more = dict(_SETTINGS)
    with measuring(problem.device) as making:
        method = found if isinstance(found, sc.Method) else found(reward, alpha)
    trains = method.default_iterations > 0
    distils = label == _DISTILLED[0]
    if trains and method != sc.ValueGuidance("ratio"):  # which ends by itself, on held-out paths
        more["iterations"] = iterations or _iterations(problem, method, budget - making.seconds)
    with measuring(problem.device) as training:
        solution = sc.solve(problem, method, seed=seed, **more)
        if distils:
            solution = sc.distill(solution, iterations=iterations or _DISTILLED[1], seed=seed, progress=False)
    n = _FEWER.get(label, digit.MEASURED)
    with measuring(problem.device) as sampling:
        x, measured = _measure(solution, n, seed + 1)
    elbo: Estimate = measured.pop("elbo")
    numbers = {name: {"value": e.value, "stderr": e.stderr} for name, e in measured.items() if isinstance(e, Estimate)}
    gap = tilt.log_z - elbo
    return {
        "reward_name": reward,
        "version": digit.VERSION,
        "method": label,
        "alpha": alpha,
        "seed": seed,
        "settings": {"name": method.name, **{f.name: _plain(getattr(method, f.name)) for f in fields(method)}},
        "iterations": solution.iterations,
        "batch_size": BATCH,
        "budget_cpu_seconds": budget if trains else 0.0,
        **numbers,
        "kl_is_a_bound": isinstance(solution, ParticleSolution) and solution.particles.selection == "weights",
        "elbo": {"value": elbo.value, "stderr": elbo.stderr},
        "objective": {"value": alpha * elbo.value, "stderr": alpha * elbo.stderr},
        "gap": {"value": gap.value, "stderr": gap.stderr},
        "ess": measured["ess"],
        **digit.properties(x, tilt),
        "training": _together(making, training),
        "sampling_per_1000": {k: 1000 * v / n for k, v in asdict(sampling).items() if k != "memory"},
        "sampling_over_untuned": _against_untuned(solution, n, sampling.seconds, label in _FEWER),
        "images": x[:SHOWN].mul(100).round().int().tolist(),
        **_stamp(
            f"--reward {reward} --method '{label}' --alpha {alpha:g} --seeds {seed + 1}"
            + (f" --cpu-seconds {budget:g}" if trains else "")
        ),
    }


def _plain(value: Any) -> str:
    return type(value).__name__ if isinstance(value, torch.nn.Module) else repr(value)


def _stamp(arguments: str) -> dict[str, Any]:
    return {
        "versions": versions(),
        "command": f"OMP_NUM_THREADS=1 python -m benchmarks digits {arguments}",
    }


def _measure(solution: Solution, n: int, seed: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """``n`` samples, and reward, KL, ELBO and log Z from these very samples."""
    problem, alpha = solution.problem, solution.problem.alpha
    if not isinstance(solution, ParticleSolution):
        paths = solution.simulate(n, seed, keep="end")
        log_w = log_weights(problem, paths).double()
        with torch.no_grad():
            x = paths.samples
        reward, kl = mean_estimate(problem.reward(x)), mean_estimate(paths.kl())
        elbo, ess = mean_estimate(log_w), effective_sample_size(log_w)
        return x, {"reward": reward, "kl": kl, "elbo": elbo, "log_z": log_mean_weight(log_w), "ess": ess}
    if solution.particles.selection == "best":
        evaluation = solution.evaluate(n * solution.particles.num_particles, seed)
        x = solution.sample(n, seed)
        names = ("reward", "kl", "elbo", "log_z")
        return x, {**{name: getattr(evaluation, name) for name in names}, "ess": evaluation.ess.value}
    # One sample per system, of law q: KL(q || p_r) <= log Z - E log Z^, so that KL(q || p_0) <= E_q r/alpha - E log Z^.
    x, log_z = solution.weighted_sample(n, seed)
    reward = problem.reward(x)
    most = mean_estimate(reward.double() / alpha - log_z.double())
    return x, {
        "reward": mean_estimate(reward),
        "kl": most,
        "elbo": mean_estimate(log_z),
        "log_z": log_mean_weight(log_z),
        "ess": effective_sample_size(log_z),
    }


def tilt_cell(reward: str, alpha: float) -> dict[str, Any]:
    """What the exactly tilted law has in every column."""
    torch.set_num_threads(1)
    tilt = digit.Tilt.of(digit.pool_rewards(reward), alpha)
    index = tilt.resampled(SHOWN, 3)
    zero = {"value": 0.0, "stderr": tilt.log_z.stderr}
    return {
        "reward_name": reward,
        "version": digit.VERSION,
        "method": TILT,
        "seed": 0,
        **tilt.as_dict(),
        "gap": zero,
        "objective": {"value": alpha * tilt.log_z.value, "stderr": alpha * tilt.log_z.stderr},
        **digit.properties_of_tilt(tilt),
        "images": digit.pool()[index].mul(100).round().int().tolist(),
        **_stamp("--method 'exact tilt'"),
    }


def _frontier_cell(reward: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    return {
        "reward_name": reward,
        "frontier": digit.frontier(reward),
        "n": len(digit.pool()),
        "definition": digit.REWARDS[reward],
        "trusted_from": digit.TRUSTED,
        "untuned": {"value": float(digit.pool_rewards(reward).mean())},
        **_stamp("--method 'exact tilt'"),
    }


# ---------------------------------------------------------------------------------------- the suite


def _cell_path(results: Path, reward: str, label: str, alpha: float, seed: int, budget: float) -> Path:
    trained = f"--{budget:g}s" if label != TILT and _is_trained(label) else ""
    return results / f"{reward}--{label.replace(', ', '-').replace(' ', '-').lower()}--{alpha:g}--{seed}{trained}.json"


def _store(path: Path, work: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")  # of few effective samples: the cell has the number
    try:
        cell = work(*arguments)
    except (RuntimeError, ValueError, TypeError) as error:  # a method that diverges or refuses is a result
        reward, label, alpha, seed = arguments[:4]
        cell = {"reward_name": reward, "method": label, "alpha": alpha, "seed": seed, "failed": str(error)}
        cell |= {"budget_cpu_seconds": arguments[4], "versions": versions()}
    store(path, cell, indent=None)


def _run(path: Path, work: Callable[..., dict[str, Any]], arguments: tuple[Any, ...], again: bool) -> None:
    if path.exists() and not again:
        return
    worker = multiprocessing.get_context("spawn").Process(target=_store, args=(path, work, arguments))
    worker.start()
    worker.join()
    if worker.exitcode:
        sys.exit(f"{path.stem}: the process ended with {worker.exitcode}.")
    cell = json.loads(path.read_text())
    gap = cell.get("gap", {}).get("value", math.nan)
    print(f"{path.stem:<60} gap {gap:.3g}{' ' + cell['failed'][:60] if 'failed' in cell else ''}", flush=True)


def digits(
    reward: Annotated[list[str] | None, typer.Option(help="class, ink or zip; all if not given.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Rows of the table; all if not given.")] = None,
    alpha: Annotated[list[float] | None, typer.Option(help="Temperatures; the core's if not given.")] = None,
    cpu_seconds: Annotated[float, typer.Option(min=1, help="Per cell, fits and training.")] = BUDGET,
    iterations: Annotated[int | None, typer.Option(min=1, show_default="what the CPU-seconds pay for")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ...")] = 1,
    results: Annotated[Path, typer.Option(help="Where finished cells are kept.")] = RESULTS,
    again: Annotated[bool, typer.Option("--again", help="Run finished cells again.")] = False,
    page: Annotated[
        bool, typer.Option("--page", help="Only write docs/tables/digits.md and its figures from what is there.")
    ] = False,
) -> None:
    """Digits: reward against KL, gap, coverage and diversity of all methods, beside the exactly tilted law.

    Example: python -m benchmarks digits --reward ink --alpha 1.2
    """
    labels, rewards = method or [TILT, *METHODS], reward or list(digit.ALPHAS)
    for name, given, known in (("method", labels, [TILT, *METHODS]), ("reward", rewards, list(digit.ALPHAS))):
        for value in given:
            if value not in known:
                raise typer.BadParameter(f"{value!r}; known are {', '.join(known)}.", param_hint=f"--{name}")
    if not page:
        for name in rewards:
            _run(results / f"{name}--frontier.json", _frontier_cell, (name,), again)
        for place in range(digit.CORE):
            for label in labels:
                for name in rewards:
                    for a in alpha or digit.ALPHAS[name][place : place + 1]:
                        if label == TILT:
                            _run(_cell_path(results, name, label, a, 0, 0.0), tilt_cell, (name, a), again)
                            continue
                        for s in range(seeds):
                            arguments = (name, label, a, s, cpu_seconds, iterations)
                            _run(_cell_path(results, *arguments[:5]), run_cell, arguments, again)
            if alpha:
                break
    cells = [json.loads(p.read_text()) for p in sorted(results.glob("*.json"))]
    order = [TILT, *METHODS]
    write_figures(cells, order)
    print(write_page(cells, order))
