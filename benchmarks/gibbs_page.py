"""The page and the figure of the Gibbs targets, from their cells."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .mixture_page import over_seeds

__all__ = ["write_figure", "write_page"]

ROOT = Path(__file__).parents[1]
PAGE, NOTES = ROOT / "docs" / "tables" / "gibbs_table.md", ROOT / "docs" / "tables" / "gibbs_table_notes.md"
FIGURE = ROOT / "docs" / "tables" / "images" / "gibbs_table.png"

Cell = dict[str, Any]

#: the best published figures that are known to us, on very different budgets, mostly on GPUs
PUBLISHED = {
    "funnel": "error of log Z 0.012, ESS 0.95 (learned mixture prior, 2503.00524)",
    "gmm9": "ESS 0.91",
    "gmm40-2d": "ESS 0.95",
    "gmm40-50d": "Sinkhorn 3787 (2412.07081)",
    "many-well-32": "reweighted error 0.02, W2 5.30 (2402.05098)",
    "dw-4": "W2 0.43 (2506.22565)",
    "lj-13": "W2 1.59 (2506.22565)",
}
_BUDGET_OF_BARS = 600.0


def _of(cells: Sequence[Cell], row: str, target: str, budget: float) -> list[Cell]:
    return [c for c in cells if (c["row"], c["target"], c["budget_cpu_seconds"]) == (row, target, budget)]


def _reference(cells: Sequence[Cell], target: str) -> tuple[float | None, str]:
    """log Z of a target, and where it is from: exact, or the most precise reliable particle estimate."""
    group = [c for c in cells if c["target"] == target and "failed" not in c]
    if not group:
        return None, "not known"
    if group[0]["exact_log_z"] is not None:
        return group[0]["exact_log_z"], "exact"
    sure = [c for c in group if c["row"] in ("smc", "auto") and c["evaluation"]["reliable"]]
    if not sure:
        return None, "not known"
    best = min(sure, key=lambda c: c["evaluation"]["log_z"]["stderr"] or math.inf)
    found = best["evaluation"]["log_z"]
    return found["value"], f"{found['value']:.4f} ± {found['stderr']:.1g}, from {best['row']}"


def _pick(cell: Cell, *names: str) -> float | None:
    value: Any = cell
    for name in names:
        if not isinstance(value, dict) or name not in value:
            return None
        value = value[name]
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _seeds(cells: Sequence[Cell], value: Callable[[Cell], float | None]) -> str:
    return over_seeds([v for c in cells if (v := value(c)) is not None])


def _line(row: str, group: Sequence[Cell], log_z: float | None) -> str:
    good = [c for c in group if "failed" not in c]
    if not good:
        return f"| {row} ({len(group)}) | failed | | | | | | | |"

    def against(*names: str) -> Callable[[Cell], float | None]:
        def difference(c: Cell) -> float | None:
            v = _pick(c, *names)
            return None if v is None or log_z is None else v - log_z

        return difference

    modes = [c["modes"] for c in good if "modes" in c]
    ess = [_seeds(good, lambda c, n=n: _pick(c, "certificate", n, "value")) for n in ("reverse_ess", "forward_ess")]
    own = _seeds(good, lambda c: _pick(c, "evaluation", "ess", "value"))
    alarms = sum(bool(c.get("certificate", {}).get("alarms")) for c in good)
    parts = [
        f"{row} ({len(good)})",
        _seeds(good, against("evaluation", "log_z", "value")),
        _seeds(good, against("evaluation", "elbo", "value")),
        _seeds(good, against("certificate", "elbo", "value")),
        f"{own}; {ess[0]} / {ess[1]}",
        "–" if not modes else f"{min(m[0] for m in modes)} of {modes[0][1]}",
        _seeds(good, lambda c: _pick(c, "sliced_w1")),
        f"{statistics.median(c['spent']['values'] for c in good):.1e}",
        f"{statistics.median(c['spent']['cpu_seconds'] for c in good):.0f}"
        + (f"; alarm in {alarms}" if alarms else ""),
    ]
    return "| " + " | ".join(parts) + " |"


_HEAD = (
    "| row (seeds) | log Z − true | ELBO − log Z | ELBO of the control's paths − log Z | ESS: own; paths' reverse / "
    "forward | modes | sliced W1 | evaluations | CPU-s |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
)


def _table(cells: Sequence[Cell], rows: Sequence[str], target: str, budget: float) -> list[str]:
    log_z, source = _reference(cells, target)
    lines = [f"### {target}, {budget:g} CPU-s", ""]
    about = [f"log Z: {source}."]
    if target in PUBLISHED:
        about.append(f"Best published: {PUBLISHED[target]}.")
    lines += [" ".join(about), "", *_HEAD]
    lines += [_line(row, group, log_z) for row in rows if (group := _of(cells, row, target, budget))]
    return [*lines, ""]


def _bars(cells: Sequence[Cell]) -> list[str]:
    """The bars, cell by cell: what is asked of one default method at 600 CPU-s."""
    lines = ["| bar | asked | measured, seed by seed |", "|---|---|---|"]

    def cells_of(target: str) -> list[Cell]:
        return [c for c in _of(cells, "auto", target, _BUDGET_OF_BARS) if "failed" not in c]

    def row(target: str, asked: str, found: Callable[[Cell], str]) -> None:
        group = cells_of(target)
        lines.append(f"| {target} | {asked} | {'; '.join(found(c) for c in group) or 'no cell yet'} |")

    def gmm9(c: Cell) -> str:
        k = c["certificate"]
        return (
            f"path ELBO gap {-k['elbo']['value']:.3f}, ESS {k['reverse_ess']['value']:.2f} / "
            f"{k['forward_ess']['value']:.2f}, {c['modes'][0]}/9; particles' ELBO gap "
            f"{-c['evaluation']['elbo']['value']:.4f}"
        )

    def funnel(c: Cell) -> str:
        k = c.get("certificate")
        paths = f"; path ELBO {k['elbo']['value']:.1f}" if k else ""
        return (
            f"{c['evaluation']['log_z']['value']:+.3f}, particles' ELBO {c['evaluation']['elbo']['value']:.3f}{paths}"
        )

    def wells(c: Cell) -> str:
        z, left = c["exact_log_z"], c["left"]
        off = max(abs(a - left["exact"]) / max(e, 1e-12) for a, e in zip(left["shares"], left["stderr"]))
        gap = f", path ELBO gap {z - c['certificate']['elbo']['value']:.2f}" if "certificate" in c else ""
        return (
            f"{c['evaluation']['log_z']['value'] - z:+.4f}, wells within {off:.1f} errors of "
            f"{max(left['stderr']):.4f}{gap}, particles' {z - c['evaluation']['elbo']['value']:.4f}"
        )

    row("gmm9", "ELBO gap ≤ 0.10, both ESS ≥ 0.8, 9/9 modes", gmm9)
    row("funnel", "error of log Z ≤ 0.05, ELBO ≥ -0.30", funnel)
    row("many-well-32", "error ≤ 0.05, every well within 3 errors ≤ 0.005, ELBO gap ≤ 2", wells)
    row(
        "gmm40-50d",
        "40/40 modes",
        lambda c: f"{c['modes'][0]}/{c['modes'][1]}, log Z {c['evaluation']['log_z']['value']:+.3f}",
    )
    return lines


def _against_smc(cells: Sequence[Cell], targets: Sequence[str], budget: float = 60.0) -> list[str]:
    """Target by target: whether ``auto`` is worse than plain SMC by more than the errors say, on the seeds that both
    have."""
    lines = []
    for target in targets:
        log_z = _reference(cells, target)[0]
        groups = [
            {c["seed"]: c for c in _of(cells, row, target, budget) if "failed" not in c} for row in ("auto", "smc")
        ]
        seeds = sorted(groups[0].keys() & groups[1].keys())
        if log_z is None or not seeds:
            continue
        errors, bars, spent, seconds = [], [], [], []
        for group in groups:
            found = [group[seed]["evaluation"]["log_z"] for seed in seeds]
            errors.append(math.sqrt(statistics.fmean((f["value"] - log_z) ** 2 for f in found)))
            bars.append(math.sqrt(statistics.fmean(f["stderr"] ** 2 for f in found)))
            spent.append(statistics.median(group[seed]["spent"]["values"] for seed in seeds))
            seconds.append(statistics.median(group[seed]["spent"]["cpu_seconds"] for seed in seeds))
        margin = 2 * math.hypot(*bars)
        verdict = (
            "**worse**" if errors[0] > errors[1] + margin else "better" if errors[1] > errors[0] + margin else "equal"
        )
        lines.append(
            f"| {target} ({len(seeds)}) | {errors[0]:.2g} ± {bars[0]:.1g} | {errors[1]:.2g} ± {bars[1]:.1g} | "
            f"{verdict} | {spent[0]:.1e} / {spent[1]:.1e} | {seconds[0]:.0f} / {seconds[1]:.0f} |"
        )
    if not lines:
        return []
    return [
        f"## `auto` against plain SMC, {budget:g} CPU-s",
        "",
        "Root mean square error of log Z over the seeds that both have, ± the standard errors that they report; "
        "*equal*: within two of both together. Where log Z is not known exactly, the most precise of these estimates "
        "stands for it.",
        "",
        "| target (seeds) | auto | smc | auto is | evaluations, auto / smc | CPU-s |",
        "|---|---:|---:|---|---:|---:|",
        *lines,
        "",
    ]


def write_page(cells: Sequence[Cell], rows: Sequence[str], targets: Sequence[str]) -> Path:
    """Write the page from the cells there are."""
    budgets = sorted({c["budget_cpu_seconds"] for c in cells})
    lines = [
        "# Sampling unnormalised densities: the table",
        "",
        "Written by `OMP_NUM_THREADS=1 python -m benchmarks gibbs` from the cells in `benchmarks/results/gibbs/`: one "
        "thread, 100 steps for what runs on a chain, default settings and the default network throughout, the "
        "reference's scale from the pilot run. A row's budget pays for the pilot, the training and, for particles, the "
        "estimate. Mean ± standard error over seeds.",
        "",
        "*smc*: `TemperedSMC(8192)`, adaptive tempering with Hamiltonian moves, nothing learned. *auto*: "
        '`method="auto"`, SMC that learns a mixture '
        "to begin with; its own columns are those of its particles, *ELBO of the control's paths* and the second "
        "pair of ESS those of its `control`, the exact "
        "control towards the mixture on 100 steps. For particles the ELBO is `E log Z^` of a system. *evaluations*: "
        "calls of the log density in rows (those of "
        "moves by gradient with a gradient each), estimate included. *alarm*: `sc.certify` found that a part of the "
        "target is missed, or weights that the "
        "sampler's own paths never show.",
        "",
        "## The bars",
        "",
        "One default method and setting, 600 CPU-s:",
        "",
        *_bars(cells),
        "",
        *_against_smc(cells, targets),
    ]
    if NOTES.exists():
        lines += [NOTES.read_text().strip(), ""]
    lines += ["![Error of log Z](images/gibbs_table.png)", ""]
    for budget in budgets:
        lines += [f"## At {budget:g} CPU-s", ""]
        for target in targets:
            if any(c["target"] == target and c["budget_cpu_seconds"] == budget for c in cells):
                lines += _table(cells, rows, target, budget)
    failed = [c for c in cells if "failed" in c]
    if failed:
        lines += ["## Why cells failed", ""]
        lines += [f"* {c['row']}, {c['target']}, seed {c['seed']}: {c['failed'][:300]}" for c in failed]
    PAGE.write_text("\n".join(lines).rstrip() + "\n")
    return PAGE


def write_figure(cells: Sequence[Cell], rows: Sequence[str], targets: Sequence[str]) -> None:
    """Absolute error of log Z, one point per cell, one panel per target."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    known = [t for t in targets if _reference(cells, t)[0] is not None]
    shown = [r for r in rows if any(c["row"] == r for c in cells)]
    if not known or not shown:
        return
    columns = min(5, len(known))
    lines = -(-len(known) // columns)
    size = (2.1 * columns + 2.2, lines * (0.28 * len(shown) + 0.8) + 0.5)
    figure, axes = plt.subplots(lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(known) :]:
        axis.set_axis_off()
    for axis, target in zip(axes.flat, known):
        log_z = _reference(cells, target)[0]
        for c in cells:
            if c["target"] != target or "failed" in c or log_z is None:
                continue
            value = _pick(c, "evaluation", "log_z", "value")
            if value is None:
                continue
            large = c["budget_cpu_seconds"] >= _BUDGET_OF_BARS
            axis.plot(
                max(abs(value - log_z), 1e-4),
                shown.index(c["row"]),
                "D" if large else "o",
                color="tab:orange" if large else "tab:blue",
                alpha=0.8,
                markersize=5,
            )
        axis.set_xscale("log")
        axis.set_xlim(5e-5, 1e2)
        axis.set_title(target, fontsize=9)
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(labelsize=8)
    axes[0][0].set_yticks(range(len(shown)), shown)
    axes[0][0].invert_yaxis()
    figure.supxlabel("error of log Z in nats (round: 60 CPU-s, diamond: 600)", fontsize=9)
    figure.tight_layout()
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=130)
    plt.close(figure)
