"""The page and the figure of the control card, from its cells."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

__all__ = ["write_figure", "write_page"]

ROOT = Path(__file__).parents[1]
PAGE, FIGURE, NOTES = (
    ROOT / "docs" / "tables" / "control.md",
    ROOT / "docs" / "tables" / "images" / "control.png",
    ROOT / "docs" / "tables" / "control_notes.md",
)


def _grouped(cells: list[dict[str, Any]], methods: list[str]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    problems = list(dict.fromkeys(c["problem"] for c in cells))
    return {
        p: {m: found for m in methods if (found := [c for c in cells if c["problem"] == p and c["method"] == m])}
        for p in problems
    }


def _over_seeds(values: list[float]) -> str:
    """Mean and standard error over seeds; where the values spread over decades, their geometric mean and range."""
    if not values:
        return "–"
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.2g}"
    low, high = min(values), max(values)
    if low > 0 and high / low > 4:
        return f"{math.exp(statistics.fmean(map(math.log, values))):.1e} ({low:.0e} to {high:.0e})"
    return f"{mean:.3g} ± {statistics.stdev(values) / math.sqrt(len(values)):.1g}"


def _seconds(cells: list[dict[str, Any]], part: str) -> str:
    values = [c["seconds_to"][part] for c in cells]
    reached = [v for v in values if v is not None]
    if not reached:
        return "–"
    missing = f" ({len(reached)} of {len(values)})" if len(reached) < len(values) else ""
    return f"{statistics.fmean(reached):.1f}{missing}"


def _table(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        "| method | error, discretised | error, continuous | ELBO gap | CPU-s to 10 % | 1 % | 0.1 % | CPU-s | per "
        "iteration | peak MB | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method, all_cells in found.items():
        cells = [c for c in all_cells if "failed" not in c]
        failed = len(all_cells) - len(cells)
        if not cells:
            lines.append(f"| {method} | {all_cells[0]['failed'][:120]} | | | | | | | | | {failed} failed |")
            continue
        error = {
            column: _over_seeds([c["control_error"][column]["absolute"]["value"] for c in cells])
            for column in ("discretised", "continuous")
        }
        gap = _over_seeds([c["gap"]["value"] for c in cells]) + ("" if cells[0]["gap_is_exact"] else " (est.)")
        extra = statistics.fmean(c["peak_mb"] - c["peak_mb_before"] for c in cells)
        lines.append(
            f"| {method} | {error['discretised']} | {error['continuous']} | {gap} | {_seconds(cells, '0.1')} | "
            f"{_seconds(cells, '0.01')} | {_seconds(cells, '0.001')} | "
            f"{statistics.fmean(c['cpu_seconds'] for c in cells):.0f} | "
            f"{statistics.fmean(c['cpu_seconds_per_iteration'] for c in cells):.3f} | {extra:.0f} | "
            f"{len(cells)}{f', {failed} failed' if failed else ''} |"
        )
    return lines


def write_page(cells: list[dict[str, Any]], methods: list[str]) -> str:
    """Write ``docs/tables/control.md`` and return it."""
    parts = [
        "# The control card",
        "",
        "Written by `OMP_NUM_THREADS=1 python -m benchmarks control` from the cells in `benchmarks/results/control/`; "
        "one thread, default settings of `solve` and the default control network throughout, the card's batch sizes "
        "and steps, nothing set by problem but the CPU-seconds.",
        "",
        "Errors are `E int |u - u*|^2 dt` on Euler paths of the exact control, against the optimum of the discretised "
        "chain and against that of continuous time: a method that is exact on the chain stops, in the second column, "
        "at the distance between the two. CPU-seconds to 10 %, 1 % and 0.1 % are those after which the error against "
        "the discretised optimum stays below that part of the mean `|u*|^2`. Several seeds: mean ± standard error, or "
        "the geometric mean with the range where seeds differ by more than a factor of 4.",
        "",
        "![error against CPU-seconds](images/control.png)",
    ]
    for problem, found in _grouped(cells, methods).items():
        good = next((c for group in found.values() for c in group if "failed" not in c), None)
        if good is None:
            continue
        parts += [
            "",
            f"## {problem}",
            "",
            f"{good['definition']} {good['time_steps']} steps, batch {good['batch_size']}, mean |u*|² = "
            f"{good['mean_square_of_the_optimum']:.4g}.",
            "",
            *_table(found),
        ]
    if NOTES.exists():
        parts += ["", NOTES.read_text().strip()]
    text = "\n".join(parts) + "\n"
    PAGE.write_text(text)
    return text


def write_figure(cells: list[dict[str, Any]], methods: list[str]) -> None:
    """Error against CPU-seconds, one panel per problem."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grouped = _grouped(cells, methods)
    if not grouped:
        return
    figure, axes = plt.subplots(1, len(grouped), figsize=(4.2 * len(grouped), 4.2), squeeze=False, layout="constrained")
    colours = {m: f"C{i}" for i, m in enumerate(methods)}
    for axis, (problem, found) in zip(axes[0], grouped.items()):
        size = 1.0
        for method, group in found.items():
            for cell in group:
                if "failed" in cell:
                    continue
                size = cell["mean_square_of_the_optimum"]
                points = cell["curve"]
                axis.plot(
                    [p["cpu_seconds"] for p in points],
                    [p["discretised"] for p in points],
                    color=colours[method],
                    linewidth=1.2,
                    alpha=0.8,
                )
        for part in (0.1, 0.01, 0.001):
            axis.axhline(part * size, color="0.8", linewidth=0.8, zorder=0)
            axis.text(
                0.99,
                part * size,
                f"{100 * part:g} %",
                ha="right",
                va="bottom",
                color="0.5",
                fontsize=7,
                transform=axis.get_yaxis_transform(),
            )
        axis.set(xscale="log", yscale="log", title=problem, xlabel="CPU-seconds")
    axes[0][0].set_ylabel("control error, discretised optimum")
    shown = [m for m in methods if any(m in found for found in grouped.values())]
    handles = [plt.Line2D([], [], color=colours[m], label=m) for m in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(shown)), fontsize=8, frameon=False)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=110)
    plt.close(figure)
