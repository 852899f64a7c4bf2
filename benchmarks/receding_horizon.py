"""Receding horizon, beside pytorch-mppi: the cost that a run collects, per call of the model and per second.

Three plants with bounded inputs, of which the model knows everything; each planner simulates as many paths of as many
steps at a decision, with the same exploring noise and temperature. Where our steps' noise is of unit size, the input is
``clip(scale w)``; pytorch-mppi clips to its bounds. Each cell is a JSON file under
``benchmarks/results/receding_horizon/``; one that exists is not run again.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import sdecontrol as sc

from .cells import store, versions

__all__ = ["receding_horizon"]

RESULTS = Path(__file__).parent / "results" / "receding_horizon"
PAGE = Path(__file__).parents[1] / "docs" / "tables" / "receding_horizon.md"
NUMBERS = (32, 128, 512)
PLANNERS = ("ours", "ours, whole weights", "pytorch-mppi")


@dataclass(frozen=True)
class Plant:
    """``move(x, a) -> x'`` with actions a ``(batch, inputs)`` within bounds, ``cost(x) -> (batch,)`` of a state."""

    move: Callable[[Tensor, Tensor], Tensor]
    cost: Callable[[Tensor], Tensor]
    start: tuple[float, ...]
    high: float
    scale: float  # of the exploring noise
    inputs: int = 1
    look: int = 30  # steps of a plan
    steps: int = 150  # of a run
    alpha: float = 1.0

    def __post_init__(self) -> None:
        assert self.scale > 0


def _pendulum(x: Tensor, a: Tensor) -> Tensor:
    speed = x[:, 1] + 0.05 * (15.0 * x[:, 0].sin() + 3.0 * a[:, 0])
    return torch.stack([x[:, 0] + 0.05 * speed, speed], 1)


def _cart_pole(x: Tensor, a: Tensor) -> Tensor:
    """Position, angle from upright, and their speeds; a pole of half a metre and a tenth of the cart's mass."""
    angle, speed, turn, h = x[:, 1], x[:, 2], x[:, 3], 0.02
    sine, cosine = angle.sin(), angle.cos()
    push = (a[:, 0] + 0.05 * turn**2 * sine) / 1.1
    turning = (9.81 * sine - cosine * push) / (0.5 * (4.0 / 3.0 - 0.1 * cosine**2 / 1.1))
    speeding = push - 0.05 * turning * cosine / 1.1
    speed, turn = speed + h * speeding, turn + h * turning
    return torch.stack([x[:, 0] + h * speed, angle + h * turn, speed, turn], 1)


_CENTRES = torch.tensor([[1.0, 1.0], [2.0, 1.2], [1.2, 2.2], [2.4, 2.4], [0.3, 1.8], [1.9, 0.2]])


def _glider(x: Tensor, a: Tensor) -> Tensor:
    speed = 0.98 * x[:, 2:] + 0.05 * a
    return torch.cat([x[:, :2] + 0.05 * speed, speed], 1)


def _obstacles(x: Tensor) -> Tensor:
    inside = ((x[:, None, :2] - _CENTRES).norm(dim=2) < 0.35).any(1)
    return (x[:, :2] - 3.0).square().sum(1) + 0.05 * x[:, 2:].square().sum(1) + 100.0 * inside


PLANTS = {
    "pendulum, torque below gravity": Plant(
        _pendulum, lambda x: 10 * (1 - x[:, 0].cos()) + 0.1 * x[:, 1] ** 2, (math.pi, 0.0), high=2.0, scale=2.0
    ),
    "cart-pole, swing up": Plant(
        _cart_pole,
        lambda x: 10 * (1 - x[:, 1].cos()) + 0.5 * x[:, 0] ** 2 + 0.02 * x[:, 3] ** 2,
        (0.0, math.pi, 0.0, 0.0),
        high=10.0,
        scale=6.0,
        look=50,
        steps=300,
    ),
    "obstacles in the plane": Plant(
        _glider, _obstacles, (0.0, 0.0, 0.0, 0.0), high=3.0, scale=2.0, inputs=2, look=40, steps=120
    ),
}


def ours(plant: Plant, n: int, seed: int, trust_region: float | None) -> Callable[[Tensor, int], Tensor]:
    def step(x: Tensor, w: Tensor, k: int) -> Tensor:
        return plant.move(x, (plant.scale * w).clamp(-plant.high, plant.high))

    start = torch.tensor(plant.start)
    chain = sc.discrete_dynamics(step, steps=plant.look, dim=len(start), noises=plant.inputs)
    problem = sc.ControlProblem(
        chain,
        initial=sc.Dirac(start),
        reward=lambda x: -plant.cost(x),
        running_cost=lambda x, t: plant.cost(x),
        alpha=plant.alpha,
    )
    method, bound = sc.PathIntegralGuidance(num_paths=n), plant.high / plant.scale
    planner = sc.RecedingHorizon(problem, method, bounds=(-bound, bound), trust_region=trust_region, seed=seed)
    return lambda x, k: plant.scale * planner.act(x, float(k))


def peer(plant: Plant, n: int, seed: int) -> Callable[[Tensor, int], Tensor]:
    from pytorch_mppi import MPPI  # pyright: ignore[reportMissingImports]  # of the extra "bench"

    torch.manual_seed(seed)
    planner = MPPI(
        plant.move,
        lambda x, a: plant.cost(x),
        len(plant.start),
        plant.scale**2 * torch.eye(plant.inputs),
        num_samples=n,
        horizon=plant.look,
        lambda_=plant.alpha,
        u_min=torch.full((plant.inputs,), -plant.high),
        u_max=torch.full((plant.inputs,), plant.high),
        U_init=torch.zeros(plant.look, plant.inputs),
    )
    return lambda x, k: planner.command(x[0]).reshape(1, -1)


def run(name: str, planner: str, n: int, seed: int) -> dict[str, Any]:
    """One run of a plant: its cost, the last part of it, and the planner's CPU-seconds."""
    plant = PLANTS[name]
    act = (
        peer(plant, n, seed) if planner == "pytorch-mppi" else ours(plant, n, seed, None if "whole" in planner else 2.0)
    )
    x, costs = torch.tensor([plant.start]), []
    begun = time.process_time()
    for k in range(plant.steps):
        x = plant.move(x, act(x, k).clamp(-plant.high, plant.high))
        costs.append(float(plant.cost(x)))
    seconds = time.process_time() - begun
    return {"cost": sum(costs), "last_tenth": sum(costs[-plant.steps // 10 :]), "seconds": seconds}


def _cells() -> list[tuple[str, str, int]]:
    return [(plant, planner, n) for plant in PLANTS for n in NUMBERS for planner in PLANNERS]


def _path(plant: str, planner: str, n: int) -> Path:
    return RESULTS / f"{plant.split(',')[0]}_{planner}_{n}.json".replace(" ", "-").replace(",", "")


def receding_horizon(
    seeds: Annotated[int, typer.Option(help="Runs of each cell.")] = 10,
    page: Annotated[bool, typer.Option("--page", help="Only write the page from the cells there are.")] = False,
) -> None:
    """Receding horizon beside pytorch-mppi on three plants with bounded inputs.

    Example: python -m benchmarks receding-horizon --page
    """
    torch.set_num_threads(1)
    for plant, planner, n in [] if page else _cells():
        path = _path(plant, planner, n)
        if path.exists():
            continue
        runs = [run(plant, planner, n, seed) for seed in range(seeds)]
        spec = PLANTS[plant]
        calls = n * spec.look
        store(path, {"plant": plant, "planner": planner, "paths": n, "calls": calls, "runs": runs} | versions())
        print(plant, planner, n, f"{statistics.mean(r['cost'] for r in runs):.1f}", flush=True)
    write_page()


def write_page() -> None:
    lines = [
        "# Receding horizon",
        "",
        "Written by `OMP_NUM_THREADS=1 python -m benchmarks receding-horizon` from the cells in "
        "`benchmarks/results/receding_horizon/` (`--page`: only the page). Plants without noise and with bounded "
        "inputs, of which planners know everything: a pendulum whose largest torque does not lift it, a cart with "
        "a pole that hangs at first, a point with inertia among six discs that cost 100 a step. At each decision a"
        " planner simulates so many *paths* of as many steps, with the same noise and temperature, one round; "
        "*ours* is `sc.RecedingHorizon`, in its second row with `trust_region=None`. **Cost**: collected over a "
        "run, mean of ten seeds with its standard error; **at the end**: of the last tenth of the run, median. "
        "CPU-milliseconds of one thread per decision, on a machine with other work on it.",
        "",
    ]
    for plant, spec in PLANTS.items():
        lines += [
            f"## {plant}",
            "",
            f"{spec.look} steps a plan, {spec.steps} a run.",
            "",
            "| paths | planner | cost | at the end | steps of the model per decision | CPU-ms per decision |",
            "|---:|---|---:|---:|---:|---:|",
        ]
        for n in NUMBERS:
            for planner in PLANNERS:
                path = _path(plant, planner, n)
                if not path.exists():
                    continue
                cell = json.loads(path.read_text())
                costs = [r["cost"] for r in cell["runs"]]
                error = statistics.stdev(costs) / len(costs) ** 0.5 if len(costs) > 1 else math.nan
                ms = 1e3 * statistics.median(r["seconds"] for r in cell["runs"]) / spec.steps
                end = statistics.median(r["last_tenth"] for r in cell["runs"])
                mean = statistics.mean(costs)
                lines.append(f"| {n} | {planner} | {mean:.0f} ± {error:.0f} | {end:.1f} | {cell['calls']} | {ms:.1f} |")
        lines.append("")
    PAGE.write_text("\n".join(lines))
