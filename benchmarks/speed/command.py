"""``python -m benchmarks speed``: measures, prints the bars, writes JSON, a figure and ``docs/tables/speed.md``."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import sdecontrol as sc

from ..timing import interleaved
from .loops import SETTINGS, Case, Setting
from .memory import CHUNK, LONG_DIM, LONG_PATHS, LONG_STEPS, MODES, measure_memory
from .page import MEMORY_STEPS, bars_table, write_figure, write_page

__all__ = ["speed"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "speed"


def _against(seconds: dict[str, list[float]], floor: str, scale: float) -> dict[str, dict[str, float]]:
    """Median time times ``scale``, and the median over rounds of the ratio to ``floor``."""
    return {
        name: {
            "median": statistics.median(values) * scale,
            "ratio": statistics.median(a / b for a, b in zip(values, seconds[floor])),
        }
        for name, values in seconds.items()
    }


def measure_setting(setting: Setting, rounds: int) -> dict[str, Any]:
    """Rollouts against the network alone, gradients against the bare loop; ns per step and path."""
    case, scale = Case(setting), 1e9 / setting.steps / setting.batch
    forward = interleaved(
        {
            "network alone": case.network_alone,
            "bare loop": case.bare,
            "torchsde": case.torchsde,
            "torchsde, noise drawn": case.torchsde_drawn,
            "ours": case.ours,
            "ours, no running cost": case.ours_without_cost,
            "ours, all kept": case.ours_keeping_all,
            "ours, default network": case.ours_default,
        },
        rounds,
    )
    gradient = interleaved(
        {
            "bare loop": case.bare_gradient,
            "torchsde": case.torchsde_gradient,
            "torchsde, noise drawn": case.torchsde_drawn_gradient,
            "ours": case.gradient_of(case.net),
            "ours, checkpoint": case.gradient_of(case.net, "checkpoint"),
            "ours, adjoint": case.gradient_of(case.net, "adjoint"),
            "ours, default network": case.gradient_of(case.default),
            "ours, default network with a Langevin term": case.gradient_of(case.langevin),
            "ours, default network, adjoint": case.gradient_of(case.default, "adjoint"),
        },
        rounds,
    )
    return {
        "forward": _against(forward, "network alone", scale),
        "forward and backward": _against(gradient, "bare loop", scale),
        "adjoint / full": statistics.median(a / b for a, b in zip(gradient["ours, adjoint"], gradient["ours"])),
    }


def measure_overhead(rounds: int, steps: int = 2000) -> dict[str, Any]:
    """Microseconds per step of one path with a trivial drift and control, without a running cost."""
    case = Case(Setting(1, 8, steps, batch=1))

    def control(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x

    def bare() -> None:
        x, h, root = torch.zeros(1, 1), 1 / steps, math.sqrt(1 / steps)
        for _ in range(steps):
            x = x + h * (control(x, x) - x) + root * torch.randn_like(x)

    def ours(keep: str) -> Callable[[], Any]:
        return lambda: sc.simulate(case.problem, 1, control=control, time_steps=steps, seed=0, keep=keep).log_ratio()

    with torch.no_grad():
        seconds = interleaved(
            {"bare loop": bare, "ours, ends kept": ours("end"), "ours, all kept": ours("all")}, rounds
        )
    return _against(seconds, "bare loop", 1e6 / steps)


def measure_scaling(rounds: int) -> dict[str, Any]:
    """CPU-seconds of a rollout against batch, dimension and steps, and the log-log slope between the two largest."""
    base = {"d": 10, "hidden": 64, "steps": 50, "batch": 512}
    grids = {"batch": [1, 16, 256, 4096], "d": [2, 16, 128, 512], "steps": [10, 100, 1000]}
    out: dict[str, Any] = {}
    for axis, values in grids.items():
        acts = {str(v): Case(Setting(**{**base, axis: v})).ours_without_cost for v in values}
        times = [statistics.median(v) for v in interleaved(acts, rounds).values()]
        slope = math.log(times[-1] / times[-2]) / math.log(values[-1] / values[-2])
        out[axis] = {"values": values, "seconds": times, "slope": slope}
    return out


def _machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return {"cpu": model, "cores": os.cpu_count(), "threads used": torch.get_num_threads()}


def _versions() -> dict[str, str]:
    import torchsde

    return {
        "sdecontrol": sc.__version__,
        "torch": torch.__version__,
        "torchsde": torchsde.__version__,
        "python": platform.python_version(),
    }


def speed(
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds; medians are printed.")] = 7,
    long: Annotated[bool, typer.Option(help="Also 10 000 steps x 4096 paths in chunks (minutes).")] = True,
    results: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS,
    page: Annotated[bool, typer.Option(help="Write docs/tables/speed.md and its figure.")] = True,
) -> None:
    """Speed and memory against the network alone, a bare loop and torchsde, interleaved in one run.

    Example: python -m benchmarks speed
    """
    torch.set_num_threads(1)
    data: dict[str, Any] = {"settings": {}, "rounds": rounds}
    for setting in SETTINGS:
        data["settings"][setting.name] = measure_setting(setting, rounds)
    data["overhead"] = measure_overhead(rounds)
    data["scaling"] = measure_scaling(min(rounds, 5))
    data["memory"] = {
        mode: {k: measure_memory(mode, int(k)) for k in MEMORY_STEPS if mode != "full" or k != "6400"} for mode in MODES
    }
    if long:
        data["long"] = {job: measure_memory(job, LONG_STEPS) for job in ("long-rollout", "long-gradient")}
        data["long"]["sizes"] = {"steps": LONG_STEPS, "paths": LONG_PATHS, "d": LONG_DIM, "chunk": CHUNK, "hidden": 64}
    data["machine"], data["versions"] = _machine(), _versions()
    data["command"] = "OMP_NUM_THREADS=1 python -m benchmarks " + " ".join(sys.argv[1:])
    results.mkdir(parents=True, exist_ok=True)
    (results / "speed.json").write_text(json.dumps(data, indent=1) + "\n")
    if page:
        write_figure(data, ROOT / "docs" / "tables" / "images" / "speed.png")
        write_page(data, ROOT / "docs" / "tables" / "speed.md")
    print(bars_table(data))
