"""Gibbs targets: methods against their exact log Z, modes and samples, at a fixed budget of CPU time.

Each finished cell (row, target, budget, seed) is a JSON file under ``benchmarks/results/gibbs/``; a cell that exists is
not run again, so that a table is filled over several sessions. Evaluations of the log density are counted by a wrapper
of the target itself. What fails, or refuses, is a cell with its reason.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import typer
from torch import Tensor, nn

import sdecontrol as sc
from sdecontrol.controls.mixture import MixtureControl
from sdecontrol.evaluation.chain_solution import ChainSolution
from sdecontrol.evaluation.tempered_solution import TemperedSolution
from sdecontrol.library.target_base import Target
from sdecontrol.methods.base import Run
from sdecontrol.problems.gibbs import GibbsProblem
from sdecontrol.randomness import Place, derive_seed

from .cells import store, versions
from .gibbs_page import write_figure, write_page

RESULTS = Path(__file__).parent / "results" / "gibbs"

SECONDS, SEEDS = 60.0, 2
TIME_STEPS = 100
VERSION = 1  # of what a cell holds
_SAMPLES, _EXACT, _EVALUATE, _CERTIFY, _RUNS = range(1, 6)  # indices of Place.OUTSIDE
_DRAWN, _PATHS = 4096, 4096
_ROUNDS = 0.6  # of the budget for auto's rounds; the rest is for the particles of its estimate
_FIRST = 0.3  # of the budget for auto's rounds where another method goes on with its control
_MOST_SYSTEMS = 64

CORE = ("gmm9", "funnel", "many-well-32", "gmm40-2d", "logistic-regression")
TARGETS = (*CORE, "gmm40-50d", "many-well-5", "many-well-50", "dw-4", "lj-13", "phi4-8")


class Counted:
    """A target that counts the rows it is called with, and how many of them with a gradient."""

    def __init__(self, target: Target) -> None:
        self.target, self.values, self.gradients = target, 0, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.values += len(x)
        self.gradients += len(x) if x.requires_grad and torch.is_grad_enabled() else 0
        return self.target(x)


@dataclass(frozen=True)
class Row:
    """A row of the table: a method on a reference; ``first``: what begins, whose control the method goes on with."""

    method: sc.Method
    reference: str = "ou"
    first: sc.Auto | None = None


@dataclass(frozen=True)
class _Timed(sc.Auto):
    """``Auto()`` whose rounds end, too, when a share of the CPU budget is spent."""

    until: ClassVar[float] = math.inf

    @property
    def name(self) -> str:
        return "auto"

    def finished(self, state: nn.Module, run: Run) -> bool:
        return time.process_time() > type(self).until or super().finished(state, run)


#: in the order in which cells are filled
ROWS: dict[str, Row] = {
    "smc": Row(sc.TemperedSMC(8192)),
    "auto": Row(sc.Auto()),
    "path integral sampler": Row(sc.RewardBackprop(), "brownian"),
    "log-variance, ou": Row(sc.LogVariance()),
    "adjoint sampling": Row(sc.AdjointMatching(reciprocal=True), "brownian"),
    "log-variance ladder": Row(sc.LogVariance(trust_region=1.0, replay=4)),
    "log-variance ladder from auto's mixture": Row(sc.LogVariance(trust_region=1.0, replay=4), first=sc.Auto()),
    "particle-matching": Row(sc.ParticleMatching()),
    "denoising diffusion sampler": Row(sc.RewardBackprop()),
    "annealed, log-variance (CMCD-LV)": Row(sc.LogVariance(), "annealed"),
    "annealed smc": Row(sc.SMC(8192), "annealed"),
    "mala": Row(sc.MALA()),
    "hmc": Row(sc.HMC()),
    "cross-entropy": Row(sc.CrossEntropy(), "ou"),
}
CORE_ROWS = ("smc", "auto", "path integral sampler", "log-variance, ou", "adjoint sampling")


def _train(problem: GibbsProblem, row: Row, budget: float, seed: int) -> tuple[Any, dict[str, Any]]:
    """Solve within the budget: rounds of auto end by time; trained methods get the number of iterations that ten of
    them promise."""
    settings: dict[str, Any] = {"seed": seed, "progress": False}
    if isinstance(row.method, sc.Auto):
        solution = _rounds(problem, row.method, _ROUNDS * budget, settings)
        return solution, {"rounds": len(solution.history), "report": solution.details["report"]}
    if row.method.default_iterations == 0:
        return sc.solve(problem, row.method, **settings), {}
    began, facts = time.process_time(), {}
    if row.first is not None:
        begun = _rounds(problem, row.first, _FIRST * budget, settings)
        facts = {"first": begun.details["report"], "first_cpu_seconds": time.process_time() - began}
        settings["control"], problem = begun.control, begun.problem
    settings["time_steps"] = TIME_STEPS
    iterations = _affordable(problem, row.method, budget, time.process_time() - began, settings)
    return sc.solve(problem, row.method, iterations=iterations, **settings), {"iterations": iterations, **facts}


def _rounds(problem: GibbsProblem, method: sc.Auto, seconds: float, settings: dict[str, Any]) -> Any:
    """Auto, whose rounds end when so many CPU-seconds are spent."""
    _Timed.until = time.process_time() + seconds
    return sc.solve(problem, _Timed(**asdict(method)), **settings)


def _affordable(problem: Any, method: sc.Method, budget: float, spent: float, settings: dict[str, Any]) -> int:
    """Iterations within a budget of which so much is spent."""
    if isinstance(method, sc.ParticleMatching):
        costs = []
        for iterations in (1, 11):
            began = time.process_time()
            sc.solve(problem, method, iterations=iterations, **settings)
            costs.append(time.process_time() - began)
        each = max(1e-3, (costs[1] - costs[0]) / 10) + 0.5 * costs[0] / method.refresh
        return max(20, int((budget - spent - costs[0]) / each))
    sc.solve(problem, method, iterations=2, **settings)
    began = time.process_time()
    sc.solve(problem, method, iterations=10, **settings)
    return max(20, int((budget - spent) / ((time.process_time() - began) / 10)))


def _estimate(solution: Any, left: float, seed: int) -> Any:
    """``evaluate``; of particles with as many systems as the rest of the budget pays for."""
    n = _PATHS
    if isinstance(solution, TemperedSolution):
        began = time.process_time()
        solution.run(1, derive_seed(seed, Place.OUTSIDE, _RUNS))
        each = time.process_time() - began
        n = solution.particles.num_particles * max(16, min(_MOST_SYSTEMS, int((left - each) / max(each, 1e-6))))
    return solution.evaluate(n, seed=derive_seed(seed, Place.OUTSIDE, _EVALUATE))


def run_cell(label: str, name: str, seed: int, budget: float) -> dict[str, Any]:
    """Solve one target by one row, and measure; ``failed`` says why there is nothing to measure."""
    row, target = ROWS[label], sc.library.named_target(name)
    counted = Counted(target)
    out: dict[str, Any] = {
        "row": label,
        "target": name,
        "target_version": target.version,
        "dim": target.dim,
        "version": VERSION,
        "seed": seed,
        "reference": row.reference,
        "settings": {"name": row.method.name, **{k: repr(v) for k, v in asdict(row.method).items()}},
        "budget_cpu_seconds": budget,
        "exact_log_z": target.log_z,
        "versions": versions(),
        "command": f"python -m benchmarks gibbs --method '{label}' --target {name} --cpu-seconds {budget:g}",
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            began = time.process_time()
            problem = sc.gibbs_problem(counted, target.dim, reference=row.reference, seed=seed)
            solution, facts = _train(problem, row, budget - (time.process_time() - began), seed)
            out |= facts
            out["training"] = _costs(counted, began)
            evaluation = _estimate(solution, budget - (time.process_time() - began), seed)
            out["evaluation"], out["spent"] = evaluation.as_dict(), _costs(counted, began)
            out |= _measured(solution, target, seed)
        except (ValueError, RuntimeError) as error:  # a method that diverges or refuses is a result
            out["failed"] = " ".join(str(error).split())
    out["warnings"] = sorted({" ".join(str(w.message).split()) for w in caught})
    return out


def _costs(counted: Counted, began: float) -> dict[str, float]:
    return {
        "values": counted.values,
        "gradients": counted.gradients,
        "cpu_seconds": time.process_time() - began,
    }


def _measured(solution: Any, target: Any, seed: int) -> dict[str, Any]:
    """What samples say, and the certificate of the control where exact samples are known."""
    out: dict[str, Any] = {}
    samples = solution.sample(_DRAWN, seed=derive_seed(seed, Place.OUTSIDE, _SAMPLES)).double()
    exact = target.sample(_DRAWN, seed=derive_seed(seed, Place.OUTSIDE, _EXACT)) if target.has_samples else None
    if exact is not None:
        out["sliced_w1"] = sc.metrics.sliced_wasserstein(samples, exact, seed=seed)
    if target.modes is not None:
        nearest = torch.cdist(samples, target.modes).argmin(1)
        out["modes"] = [len(nearest.unique()), len(target.modes)]
    if hasattr(target, "left_shares"):
        x, log_w = solution.weighted_sample(8 * _DRAWN, seed=derive_seed(seed, Place.OUTSIDE, _SAMPLES, 1))
        w = log_w.double().softmax(0)
        left = (x[:, target.wells] < 0).double()
        share = w @ left
        error = (w.square() @ (left - share).square()).sqrt()
        out["left"] = {"exact": target.left_share, "shares": share.tolist(), "stderr": error.tolist()}
    control = getattr(solution, "control", None)
    paths = not isinstance(solution, (TemperedSolution, ChainSolution)) or isinstance(control, MixtureControl)
    if exact is not None and paths:
        draws, seed = exact.to(solution.problem.dtype), derive_seed(seed, Place.OUTSIDE, _CERTIFY)
        out["certificate"] = sc.certify(solution, draws, modes=target.modes, n=_PATHS, seed=seed).as_dict()
        out["certificate"].pop("coverage")
    return out


def _cell_path(results: Path, label: str, target: str, seed: int, budget: float) -> Path:
    name = "".join(c if c.isalnum() else "-" for c in label.lower()).strip("-").replace("--", "-")
    return results / f"{name}--{target}--{budget:g}s--{seed}.json"


def gibbs(
    method: Annotated[list[str] | None, typer.Option(help="Rows of the table; the core ones if not given.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="Targets; the core ones if not given.")] = None,
    cpu_seconds: Annotated[float, typer.Option(min=1, help="For problem, training and estimate.")] = SECONDS,
    seeds: Annotated[int, typer.Option(min=1)] = SEEDS,
    results: Annotated[Path, typer.Option(help="Where finished cells are kept.")] = RESULTS,
    again: Annotated[bool, typer.Option("--again", help="Run finished cells again.")] = False,
    page: Annotated[
        bool, typer.Option("--page", help="Only write docs/tables/gibbs_table.md and its figure from what is there.")
    ] = False,
) -> None:
    """Sampling of unnormalised densities: errors of log Z, bounds and modes, per method, target and seed.

    Example: python -m benchmarks gibbs --method auto --target funnel --seeds 3
    """
    labels, names = method or list(CORE_ROWS), target or list(CORE)
    _refuse_unknown("--method", labels, ROWS)
    _refuse_unknown("--target", names, TARGETS)
    torch.set_num_threads(1)
    for seed in range(0 if page else seeds):
        for name in names:
            for label in labels:
                path = _cell_path(results, label, name, seed, cpu_seconds)
                if path.exists() and not again:
                    continue
                cell = run_cell(label, name, seed, cpu_seconds)
                store(path, cell)
                said = cell.get("failed", "")[:90] or f"log Z {cell['evaluation']['log_z']['value']:.4g}"
                print(f"{label:<34} {name:<20} seed {seed}: {said}", flush=True)
    found = [json.loads(p.read_text()) for p in sorted(results.glob("*--*s--*.json"))]
    write_figure(found, list(ROWS), TARGETS)
    print(f"wrote {write_page(found, list(ROWS), TARGETS)}")


def _refuse_unknown(option: str, given: list[str], known: Any) -> None:
    for value in given:
        if value not in known:
            raise typer.BadParameter(f"{value!r}; known are {', '.join(known)}.", param_hint=option)
