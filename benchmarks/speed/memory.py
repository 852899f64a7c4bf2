"""Peak resident memory of one run, measured in a process of its own: ``python -m benchmarks.speed.memory JOB K``."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import sdecontrol as sc

from .loops import Case, Setting, TimeNet, make_problem

__all__ = ["measure_memory"]

MODES = ("full", "checkpoint", "adjoint")
LONG_STEPS, LONG_PATHS, LONG_DIM, CHUNK = 10_000, 4096, 20, 512


def measure_memory(job: str, steps: int) -> dict[str, Any]:
    """Peak resident memory in MB, what was there before the run, and CPU-seconds."""
    command = [sys.executable, "-m", "benchmarks.speed.memory", job, str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _peak() -> float:
    """In MB. Where the system tells, of this program alone: ru_maxrss keeps the parent's peak through fork and exec."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _gradient(mode: str, steps: int) -> None:
    """d = 10, hidden 128, batch 256: the sizes of the table of memory growth."""
    case = Case(Setting(10, 128, steps, batch=256))
    case.gradient_of(case.net, mode)()


def _long(differentiate: bool, steps: int) -> None:
    """Many steps and paths, in chunks of paths, under a small network."""
    if not differentiate:
        net = TimeNet(LONG_DIM, 64)
        paths = sc.simulate(
            make_problem(LONG_DIM), LONG_PATHS, control=net, time_steps=steps, seed=0, keep="end", chunk=CHUNK
        )
        assert paths.end.shape == (LONG_PATHS, LONG_DIM)
        return
    case = Case(Setting(LONG_DIM, 64, steps, batch=CHUNK))
    act = case.gradient_of(case.net, "adjoint")
    for _ in range(LONG_PATHS // CHUNK):
        act()


def main() -> None:
    torch.set_num_threads(1)
    job, steps = sys.argv[1], int(sys.argv[2])
    run = (lambda k: _gradient(job, k)) if job in MODES else (lambda k: _long(job == "long-gradient", k))
    run(2)  # what the libraries need once
    before, began = _peak(), time.process_time()
    run(steps)
    peak = _peak()
    print(json.dumps({"peak": peak, "added": peak - before, "cpu_seconds": time.process_time() - began}))


if __name__ == "__main__":
    main()
