"""The page of the U-Net suite, from its cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .digits_page import number_text
from .unet_problem import LABEL, STEPS

__all__ = ["write_page"]

PAGE = Path(__file__).parents[1] / "docs" / "tables" / "unet.md"
Cell = dict[str, Any]


def write_page(cells: dict[str, Cell]) -> str:
    """Write ``docs/tables/unet.md`` and return it."""
    parts = [
        "# A U-Net of diffusers",
        "",
        "Written by `OMP_NUM_THREADS=1 python -m benchmarks unet` from the cells in `benchmarks/results/unet/` "
        "(`--page`: only the page). diffusers' `UNet2DModel` with 177k parameters (channels 16 and 32, one layer per "
        "block, attention inside), trained on scikit-learn's digits (8×8), with DDPM's sampler of "
        f"{STEPS} evenly spaced steps and predictions clipped to 1; reward `log p({LABEL})`, alpha = 1. One thread.",
        "",
        *_tuning(cells),
        *_memory(cells),
        *_costs(cells),
    ]
    text = "\n".join(parts).rstrip() + "\n"
    PAGE.write_text(text)
    return text


def _tuning(cells: dict[str, Cell]) -> list[str]:
    tilt = cells.get("exact-tilt")
    found = [c for c in cells.values() if "budget_cpu_seconds" in c or "failed" in c]
    if tilt is None or not found:
        return []
    lines = [
        "## Tuning",
        "",
        ("*Default*: `sc.solve(problem)`, no method named. " if any(c["method"] == "default" for c in found) else "")
        + "As `solve` has it: batches of 256, the control a tuned copy of the network. *Frozen*: "
        "`control='frozen'`, the model as it is and beside it a small network that sees the reward at the denoised "
        "state, batches of 64. "
        "So many iterations as the CPU-seconds pay for. **Gap** to the exactly tilted law (importance sampling of "
        f"16384 samples of the untuned chain; P({LABEL}) is {tilt['untuned']:.3f} there and {tilt['share']:.3f} under "
        f"the tilt, KL {number_text(tilt['kl'])}). **Step**: the largest KL between the path laws before and after one "
        "iteration, where the run has it; **KL at first**: of the first five iterations' path laws to the model.",
        "",
        f"| method | commit | CPU-s | iterations | gap | KL | P({LABEL}) | step | KL at first |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for c in found:
        label, commit = f"{c['method']}", c["versions"].get("commit")
        if "failed" in c:
            lines.append(f"| {label} | {commit} | {c['failed'][:80]} |" + " |" * 6)
            continue
        history = c["history"]
        steps = [m["kl_step"] for m in history if "kl_step" in m]
        first = ", ".join(f"{m['kl']:.2g}" for m in history[:5] if "kl" in m)
        if c["name"] != c["method"]:
            beside = "".join(f", {name}={value!r}" for name, value in c["settings"].items() if c["method"] == "default")
            label = f"{label} ({c['name']}{beside})"
        lines.append(
            f"| {label} | {commit} | {c['cpu_seconds']:.0f} | {c['iterations']} | {number_text(c['gap'])} | "
            f"{number_text(c['kl'])} | {number_text(c['share'])} | {f'{max(steps):.2g}' if steps else '–'} | {first} |"
        )
    return [*lines, ""]


def _memory(cells: dict[str, Cell]) -> list[str]:
    found = {name: c for name, c in cells.items() if "memory" in c}
    if not found:
        return []
    heads = [f"{c['steps']} steps, {c['versions'].get('commit')}" for c in found.values()]
    lines = [
        "## Memory of one iteration",
        "",
        "MiB that one iteration, batch 32, adds to the resident memory of a process of its own (CPU-seconds of this "
        "first iteration). *By hand*: states are kept, the graph of one step at a time is made.",
        "",
        "| | " + " | ".join(heads) + " |",
        "|---|" + "---:|" * len(heads),
    ]
    for job in next(iter(found.values()))["memory"]:
        row = [c["memory"].get(job) for c in found.values()]
        lines.append(
            f"| {job} | "
            + " | ".join("–" if r is None else f"{r['mib']:.0f} ({r['cpu_seconds']:.1f})" for r in row)
            + " |"
        )
    return [*lines, ""]


def _costs(cells: dict[str, Cell]) -> list[str]:
    lines: list[str] = []
    for c in (c for name, c in cells.items() if name.startswith("costs")):
        commit = c["versions"].get("commit")
        lines += [
            f"## Time of an iteration ({commit})",
            "",
            f"CPU-seconds, medians of interleaved rounds, {c['steps']} steps, batch {c['batch']}; ratios to "
            "backpropagation within a round.",
            "",
            "| | CPU-s | ratio |",
            "|---|---:|---:|",
            *(f"| {n} | {r['cpu_seconds']:.2f} | {r['ratio']:.2f} |" for n, r in c["rows"].items()),
            "",
            "Coupled oscillators, 40 steps, batch 256, the default network:",
            "",
            "| | " + " | ".join(f"d = {d}: CPU-s, ratio" for d in c["kuramoto"]) + " |",
            "|---|" + "---:|" * len(c["kuramoto"]),
        ]
        for name in next(iter(c["kuramoto"].values())):
            row = (r[name] for r in c["kuramoto"].values())
            lines.append(f"| {name} | " + " | ".join(f"{r['cpu_seconds']:.2f}, {r['ratio']:.2f}" for r in row) + " |")
        lines.append("")
    return lines
