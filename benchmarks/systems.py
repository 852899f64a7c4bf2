"""Systems to steer, each by the method that ``solve`` takes where none is named, with all defaults: what it reaches,
after how long, which ways it takes, and what the verdict says.

Each finished cell (system, seed) is a JSON file under ``benchmarks/results/systems/``, and so is what is known of a
system; one that exists is not run again. Cells run in processes of their own.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import sdecontrol as sc
from sdecontrol.evaluation.estimates import Estimate, log_mean_weight
from sdecontrol.evaluation.evaluate import log_weights
from sdecontrol.evaluation.solution import Solution
from sdecontrol.library.problems import problem_card
from sdecontrol.paths.paths import Paths
from sdecontrol.randomness import Place, derive_seed

from .cells import store, versions
from .systems_page import write_page

RESULTS = Path(__file__).parent / "results" / "systems"
_FIRST, _GROWTH = 2.0, 1.5  # CPU-seconds of the first point of a curve, and the factor between points
_SYSTEMS, _PATHS = 16, 4096
Cell = dict[str, Any]


@dataclass(frozen=True)
class System:
    """How a named problem is judged.

    Attributes:
        truth: "exact"; "paths" of the reference; "particles" of it; "tempered".
        way: which of two ways paths take, as booleans; None: there is one.
        size: of paths of the reference in a block, or of particles in a system.
        quadratic: whether the control's error is measured, too.
    """

    truth: str
    way: Callable[[Paths], Tensor] | None = None
    size: int = _PATHS
    quadratic: bool = False


def _at(time: float) -> Callable[[Paths], Tensor]:
    def states(paths: Paths) -> Tensor:
        return paths.states[int((paths.times - time).abs().argmin())]

    return states


SYSTEMS = {
    "kuramoto": System("paths", size=16384),
    "unstable-quadratic": System("exact", quadratic=True),
    "stable-quadratic": System("exact", quadratic=True),
    "allen-cahn": System("paths", size=16384),
    "cart-pole": System("particles", size=65536),
    "epidemic": System("particles", size=65536),
    "pendulum-torque": System("exact", way=lambda paths: paths.end[:, 0] > 0),
    "double-slit": System("exact", way=lambda paths: _at(1.0)(paths)[:, 0] > 0.2),
    "obstacles": System("exact", way=lambda paths: _at(0.35)(paths)[:, 1] > 0.1),
    "first-exit": System("exact"),
    "committor-mueller-brown": System("exact"),
}


def truth_cell(name: str) -> Cell:
    """log Z of the chain, and the share of the target that takes the first way."""
    torch.set_num_threads(1)
    system, card = SYSTEMS[name], problem_card(name)
    problem, began = card.make(), time.process_time()
    cell: Cell = {"problem": name, "version": card.version, "definition": card.definition, "source": system.truth}
    if system.truth == "exact":
        exact = sc.exact_solution(problem, time_steps=card.time_steps)
        cell["log_z"] = asdict(Estimate(float(exact.log_z), 0.0))
        if math.isfinite(floor := float(exact.floor)):
            cell["floor"] = floor
        if system.way is not None:
            paths = sc.simulate(problem, 65536, control=exact.control, time_steps=card.time_steps, seed=0)
            cell["share"] = asdict(_share(system, paths, log_weights(problem, paths)))
    else:
        cell["log_z"] = asdict(_measured(system, problem, card.time_steps))
    return {**cell, "cpu_seconds": time.process_time() - began, "versions": versions()}


def _measured(system: System, problem: sc.ControlProblem, steps: int) -> Estimate:
    """log Z by independent systems of reference paths or particles."""
    found = []
    for block in range(_SYSTEMS):
        seed = derive_seed(0, Place.OUTSIDE, 4, block)
        if system.truth == "paths":
            paths = sc.simulate(problem, system.size, time_steps=steps, seed=seed, keep="end")
            found.append(log_weights(problem, paths).double().logsumexp(0) - math.log(system.size))
        else:
            particles = sc.solve(
                problem, sc.SMC(num_particles=system.size), time_steps=steps, seed=seed, progress=False
            )
            found.append(torch.tensor(particles.evaluate(system.size, seed=seed, confirm=False).log_z.value))
    return log_mean_weight(torch.stack(found).double())


def _share(system: System, paths: Paths, log_w: Tensor) -> Estimate:
    """Of weighted paths, those that take the first way."""
    assert system.way is not None
    w, first = log_w.double().softmax(0), system.way(paths).double()
    share = float((w * first).sum())
    return Estimate(share, float((w * (first - share)).square().sum().sqrt()))


class _Curve:
    """What the control reaches while it is trained, at CPU times that grow geometrically; measuring is not counted."""

    def __init__(self, measure: Callable[[Solution, int], dict[str, float]]) -> None:
        self.measure, self.began = measure, time.process_time()
        self.points: list[dict[str, float]] = []
        self.next, self.measuring, self.names = _FIRST, 0.0, set[str]()

    @property
    def seconds(self) -> float:
        return time.process_time() - self.began - self.measuring

    def on_step_end(self, state: Any) -> None:
        self.names.add(state.settings["method"])
        if self.seconds < self.next:
            return
        spent, start = self.seconds, time.process_time()
        self.points.append(
            {"cpu_seconds": spent, "iterations": state.iteration, **self.measure(state.solution(), 1024)}
        )
        self.measuring += time.process_time() - start
        while self.next <= spent:
            self.next *= _GROWTH


def run_cell(name: str, seed: int, truth: Cell) -> Cell:
    """One default run."""
    torch.set_num_threads(1)
    system, card = SYSTEMS[name], problem_card(name)
    problem = card.make()
    exact = sc.exact_solution(problem, time_steps=card.time_steps) if system.quadratic else None

    def measure(solution: Solution, n: int) -> dict[str, float]:
        found = solution.evaluate(n, seed=derive_seed(seed, Place.OUTSIDE, 1), confirm=False)
        measured = {"gap": truth["log_z"]["value"] - found.elbo.value, "gap_stderr": found.elbo.stderr}
        if exact is not None:
            measured["control_error"] = sc.control_error(solution, exact, n=min(n, 1024)).relative.value
        return measured

    curve = _Curve(measure)
    settings: dict[str, Any] = {"time_steps": card.time_steps, "batch_size": card.batch_size, "seed": seed}
    solution = sc.solve(problem, callbacks=[curve], progress=False, **settings)
    seconds = curve.seconds
    began = time.process_time()
    evaluation = solution.evaluate(_PATHS, seed=derive_seed(seed, Place.OUTSIDE, 2))
    cell: Cell = {
        "problem": name,
        "version": card.version,
        "seed": seed,
        "method": solution.method,
        "reason": solution.details.get("reason"),
        "iterations": len(solution.history),
        "cpu_seconds": seconds,
        "cpu_seconds_of_evaluate": time.process_time() - began,
        "log_z": asdict(evaluation.log_z),
        "elbo": asdict(evaluation.elbo),
        "ess": evaluation.ess.value,
        "verdict": evaluation.verdict,
        "reliability": evaluation.reliability,
        **measure(solution, _PATHS),
        "curve": curve.points,
    }
    if system.way is not None and evaluation.elbo.value > -math.inf:
        paths = sc.simulate(problem, _PATHS, control=solution.control, time_steps=card.time_steps, seed=seed + 1)
        cell["share"] = asdict(_share(system, paths, log_weights(problem, paths)))
        cell["share_of_paths"] = float(system.way(paths).double().mean())
    return {**cell, "versions": versions(), "command": f"python -m benchmarks systems --problem {name} --seed {seed}"}


def systems(
    problem: Annotated[list[str] | None, typer.Option(help="Rows of the table; all if not given.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Of the runs; 0, 1, 2 if not given.")] = None,
    page: Annotated[bool, typer.Option("--page", help="Only write docs/tables/systems.md.")] = False,
) -> None:
    """Systems to steer by the default method: gap, ways, verdict, CPU-seconds.

    Example: python -m benchmarks systems --problem pendulum-torque --seed 0
    """
    context = multiprocessing.get_context("spawn")
    for name in [] if page else problem or SYSTEMS:
        if name not in SYSTEMS:
            raise typer.BadParameter(f"{name!r}; known are {', '.join(SYSTEMS)}.", param_hint="--problem")
        known = RESULTS / f"truth--{name}.json"
        if not known.exists():
            with context.Pool(1) as pool:
                store(known, pool.apply(truth_cell, (name,)))
        truth = json.loads(known.read_text())
        for number in seed or range(3):
            path = RESULTS / f"{name}--{number}.json"
            if not path.exists():
                with context.Pool(1) as pool:
                    cell = pool.apply(run_cell, (name, number, truth))
                store(path, cell)
                print({k: v for k, v in cell.items() if k not in ("curve", "versions")}, flush=True)
    cells = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("*.json"))]
    print(write_page(list(SYSTEMS), cells))
