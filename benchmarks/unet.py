"""A convolutional model as users have it (``unet_problem``), tuned with default settings: gap to the exactly tilted
law, what the first iterations did, memory and time of an iteration.

Each finished cell is a JSON file under ``benchmarks/results/unet/``; a cell that exists is not run again.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import sdecontrol as sc
from sdecontrol.comparison.costs import measuring
from sdecontrol.evaluation.estimates import mean_estimate
from sdecontrol.evaluation.evaluate import log_weights
from sdecontrol.methods.base import Suggestion, suggested

from . import unet_problem as unet
from .cells import store, versions
from .digits_problem import Tilt
from .unet_costs import MEMORY_STEPS, cost_cell, memory_cell
from .unet_page import write_page

RESULTS = Path(__file__).parent / "results" / "unet"
#: None: ``solve`` without a method, and with the settings that ``recommend`` has for it
METHODS: dict[str, sc.Method | None] = {
    "default": None,
    "reward-backprop": sc.RewardBackprop(),
    "reward-backprop, frozen": sc.RewardBackprop(),
    "adjoint-matching": sc.AdjointMatching(),
    "soft-ppo": sc.SoftPPO(),
}
#: where it is not that of ``solve``: the network beside the model, which sees the reward; smaller batches, more of them
SETTINGS: dict[str, dict[str, Any]] = {"reward-backprop, frozen": {"control": "frozen", "batch_size": 64}}
_MEASURED = 1024


def _share(x: Tensor) -> Tensor:
    """Probability of the label by the classifier, ``(n,)``."""
    with torch.no_grad():
        return torch.cat([unet.classifier()(part).softmax(1)[:, unet.LABEL] for part in x.split(4096)])


def tilt() -> Tilt:
    """The exactly tilted law, from the untuned chain's samples."""
    problem = unet.unet_problem()
    with torch.no_grad():
        return Tilt.of(torch.cat([problem.reward(x) for x in unet.pool().split(4096)]), unet.ALPHA)


def tilt_cell() -> dict[str, Any]:
    """What the exactly tilted law has."""
    torch.set_num_threads(1)
    exact, share = tilt(), _share(unet.pool()).double()
    weights = exact.log_w.softmax(0)
    return {"method": "exact tilt", **exact.as_dict(), "share": float(weights @ share), "untuned": float(share.mean())}


def run_cell(label: str, seed: int, budget: float) -> dict[str, Any]:
    """Tune with the defaults of ``solve`` for the budget, and measure samples."""
    torch.set_num_threads(1)
    problem, log_z = unet.unet_problem(), tilt().log_z
    method, settings = METHODS[label], SETTINGS.get(label, {})
    taken = Suggestion(method, "", settings) if method is not None else suggested(problem)[0]
    solve = functools.partial(sc.solve, problem, method, progress=False, **settings)
    seconds = []
    for count in (1, 1, 7):  # the first one warms up
        began = time.process_time()
        solve(iterations=count, seed=9)
        seconds.append(time.process_time() - began)
    each = (seconds[2] - seconds[1]) / 6
    iterations = max(2, int((budget - (seconds[1] - each)) / each))
    with measuring(problem.device) as training:
        solution = solve(iterations=iterations, seed=seed)
    paths = solution.simulate(_MEASURED, seed + 1, keep="end")
    log_w = log_weights(problem, paths).double()
    with torch.no_grad():
        samples = paths.samples
    elbo, kl, share = (mean_estimate(v) for v in (log_w, paths.kl(), _share(samples)))
    gap = log_z - elbo
    keys = ("objective", "kl", "kl_step", "loss")
    return {
        "method": label,
        "name": taken.method.name,
        "settings": dict(taken.settings),
        "seed": seed,
        "budget_cpu_seconds": budget,
        "iterations": iterations,
        **{n: {"value": e.value, "stderr": e.stderr} for n, e in (("gap", gap), ("kl", kl), ("share", share))},
        "history": [{k: m[k] for k in keys if k in m} for m in solution.history],
        "cpu_seconds": training.seconds,
    }


def _store(path: Path, work: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    try:
        cell = work(*arguments)
    except RuntimeError as error:  # a method that diverges is a result
        cell = {"method": arguments[0], "failed": str(error)}
    store(path, cell | {"versions": versions()})


def unet_suite(
    method: Annotated[list[str] | None, typer.Option(help="Rows of the table; all if not given.")] = None,
    cpu_seconds: Annotated[float, typer.Option(min=1, help="Per cell, of tuning.")] = 150.0,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ...")] = 1,
    tag: Annotated[str, typer.Option(help="Of cells that are kept beside those of another commit.")] = "",
    tuning: Annotated[bool, typer.Option(help="Tune.")] = True,
    costs: Annotated[bool, typer.Option(help="Memory and time of an iteration.")] = True,
    again: Annotated[bool, typer.Option("--again", help="Run finished cells again.")] = False,
    page: Annotated[bool, typer.Option("--page", help="Only write docs/tables/unet.md from what is there.")] = False,
) -> None:
    """A U-Net of diffusers tuned with default settings, and what an iteration needs. Needs the extra
    diffusers.

    Example: python -m benchmarks unet --method reward-backprop --no-costs
    """
    suffix = f"--{tag}" if tag else ""
    jobs: dict[str, tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]] = {}
    if tuning:
        jobs["exact-tilt"] = (tilt_cell, ())
        for label in method or METHODS:
            if label not in METHODS:
                raise typer.BadParameter(f"{label!r}; known are {', '.join(METHODS)}.", param_hint="--method")
            for seed in range(seeds):
                jobs[f"{label}--{seed}--{cpu_seconds:g}s{suffix}"] = (run_cell, (label, seed, cpu_seconds))
    if costs:
        jobs |= {f"memory--{k}{suffix}": (memory_cell, (k,)) for k in MEMORY_STEPS}
        jobs[f"costs{suffix}"] = (cost_cell, ())
    for name, (work, arguments) in {} if page else jobs.items():
        path = RESULTS / f"{name}.json"
        if path.exists() and not again:
            continue
        worker = multiprocessing.get_context("spawn").Process(target=_store, args=(path, work, arguments))
        worker.start()
        worker.join()
        if worker.exitcode:
            sys.exit(f"{name}: the process ended with {worker.exitcode}.")
        print(name, json.loads(path.read_text()).get("gap", ""), flush=True)
    cells = {p.stem: json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json"))}
    print(write_page(cells))
