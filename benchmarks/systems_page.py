"""The page of the systems to steer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "tables" / "systems.md"
NOTES = PAGE.with_name("systems_notes.md")
Cell = dict[str, Any]

_HEAD = """# Systems to steer

Written by `OMP_NUM_THREADS=1 python -m benchmarks systems` from the cells in `benchmarks/results/systems/` (`--page`:
only the page). Each [named problem](../control_problems.md#named-problems) by `sc.solve(problem)`: the method that
`recommend` names, no number of iterations given, the steps and the batch of the problem's card. **log Z** of the
chain: exact, or by 16 systems of reference paths or particles. **Gap**: log Z less the run's lower bound, in nats,
with the bound's standard error, from 4096 new paths; it contains the **floor**, what no shift of the noise can gain,
by the best shifts of exact solutions (on grids of the plane of those nearest to the optimal kernels). **log Z here**:
by the run's own weights, and how many standard errors it is off. **Way**: the share of the target that takes the
first of two ways, by the run's weights, and of its paths as they are. CPU-seconds of one thread on a machine with
other work on it, without what measuring takes.
"""


def write_page(order: list[str], cells: list[Cell]) -> str:
    """Write the page from all cells that there are."""
    truths = {c["problem"]: c for c in cells if "source" in c}
    runs = sorted((c for c in cells if "source" not in c), key=lambda c: (order.index(c["problem"]), c["seed"]))
    lines = [
        _HEAD,
        NOTES.read_text().rstrip(),
        "",
        "| problem | log Z | floor | seed | method | iterations | CPU-s | gap | log Z here | way | verdict | commit |",
        "|---|---:|---:|---|---|---:|---:|---:|---:|---|---|---|",
    ]
    for c in runs:
        truth = truths[c["problem"]]
        known = f"{_estimate(truth['log_z'])} | {_floor(truth)}"
        lines.append(
            f"| {c['problem']} | {known} | {c['seed']} | {c['method']} | {c['iterations']} | {c['cpu_seconds']:.0f} | "
            f"{_gap(c)} | {_here(c, truth)} | {_way(c, truth)} | {c['verdict']} | {c['versions'].get('commit')} |"
        )
    lines += ["", "## What the verdicts say", ""]
    lines += [f"* {c['problem']}, seed {c['seed']}: {c['verdict']}; {c['reliability']}" for c in runs]
    lines += [
        "",
        "## Errors along the runs",
        "",
        "Gap (of the quadratic ones the control's relative error) at CPU-s.",
        "",
    ]
    for c in runs:
        kind = "control_error" if "control_error" in c else "gap"
        points = ", ".join(f"{p[kind]:.2g} at {p['cpu_seconds']:.0f}" for p in c["curve"])
        if points:
            lines.append(f"* {c['problem']}, seed {c['seed']}: {points}")
    text = "\n".join(lines).rstrip() + "\n"
    PAGE.write_text(text)
    return text


def _estimate(e: dict[str, float]) -> str:
    return f"{e['value']:.3f} ± {e['stderr']:.3f}" if e["stderr"] else f"{e['value']:.4f}"


def _floor(truth: Cell) -> str:
    return f"{truth['floor']:.3f}" if "floor" in truth else ""


def _gap(cell: Cell) -> str:
    if cell["gap"] == float("inf"):
        return "no bound"
    found = f"{cell['gap']:.3f} ± {cell['gap_stderr']:.3f}"
    return f"{found}; control {cell['control_error']:.1e}" if "control_error" in cell else found


def _here(cell: Cell, truth: Cell) -> str:
    here, known = cell["log_z"], truth["log_z"]
    error = (here["stderr"] ** 2 + known["stderr"] ** 2) ** 0.5
    off = (here["value"] - known["value"]) / error if error else 0.0
    return f"{_estimate(here)} ({off:+.1f})"


def _way(cell: Cell, truth: Cell) -> str:
    if "share" not in truth:
        return ""
    share, known = cell.get("share"), truth["share"]
    here = "" if share is None else f"{share['value']:.2f} ± {share['stderr']:.2f}, paths {cell['share_of_paths']:.2f}"
    return f"{here} of {known['value']:.2f}"
