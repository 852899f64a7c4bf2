"""The page of the suites on sequences, from their cells."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

__all__ = ["write_page"]

PAGE = Path(__file__).parents[1] / "docs" / "tables" / "sequences.md"
NOTES = PAGE.with_name("sequences_notes.md")
Cell = dict[str, Any]
_FEW = 0.1  # effective share, below which log Z is not known from a row itself


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _error(values: list[float]) -> str:
    """Mean and standard error over seeds."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.2f}"
    return f"{mean:.2f} ± {statistics.stdev(values) / math.sqrt(len(values)):.2f}"


def _kl(cell: Cell) -> str:
    """Of the best of n where its law is not known: the bound that ties stay below."""
    if cell.get("kl") is None and cell["row"].startswith("best of"):
        n = int(cell["row"].split()[-1])
        return f"≤ {math.log(n) - (n - 1) / n:.2f}"
    return _number(cell.get("kl"))


def _known(cells: list[Cell]) -> list[str]:
    short = "tv" in cells[0]
    head = ["row", "activity", "KL", "gap", "ESS", *(["TV"] if short else []), "unique", "edits", "3-mers",
            "nats a letter", "reward calls", "CPU-s"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for c in sorted(cells, key=lambda c: c["activity"]):
        calls = f"{c['reward_calls']}" if c["reward_calls"] else f"{c['reward_calls_a_sample']:.0f} a sample"
        row = [
            c["row"],
            f"{c['activity']:.2f} ± {c['activity_error']:.2f}",
            _kl(c),
            _number(c.get("gap") if short or (c.get("ess") or 0.0) > _FEW else None, 3),
            _number(c.get("ess")),
            *([_number(c["tv"])] if short else []),
            f"{c['unique_share']:.2f}",
            f"{c['edit_diversity']:.2f}",
            f"{c['kmer_correlation']:.2f}",
            f"{c['log_likelihood']:.3f}",
            calls,
            f"{c['training_cpu_seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(row)} |")
    counts = " or ".join(str(n) for n in sorted({c["samples"] for c in cells}))
    facts = [f"{counts} samples; natural sequences have {cells[0]['natural_log_likelihood']:.3f} nats"]
    if short:
        log_z = next(c["log_z"] for c in cells if "log_z" in c)
        facts.append(f"as many exact draws have TV {cells[0]['tv_of_exact_draws']:.2f}; log Z {log_z:.3f}")
    return [*lines, "", "; ".join(facts) + ".", ""]


def _offline(cells: list[Cell]) -> list[str]:
    betas = sorted({row["beta"] for row in cells[0]["rows"]})
    lines = [
        "| KL | " + " | ".join("mean" if b == 0 else f"β = {b:g}" for b in betas) + " | the mean believes | optimum |",
        "|---:" * (len(betas) + 3) + "|",
    ]
    for kl in sorted({row["kl"] for row in cells[0]["rows"]}):

        def values(beta: float, key: str, kl: float = kl) -> list[float]:
            return [r[key] for c in cells for r in c["rows"] if r["kl"] == kl and r["beta"] == beta]

        best = [row["true"] for c in cells for row in c["exact"] if row["kl"] == kl]
        row = [_error(values(beta, "true")) for beta in betas]
        row += [_error(values(0.0, "believed")), _number(statistics.mean(best))]
        lines.append(f"| {kl:g} | {' | '.join(row)} |")
    return [*lines, ""]


def _online(cells: list[Cell]) -> list[str]:
    rows = sorted({c["row"] for c in cells})
    counts = [r["measured"] for r in cells[0]["rounds"]]
    lines = [
        f"| strategy | {' | '.join(f'after {n}' for n in counts)} | best | mean of the last | its edits | CPU-s |",
        "|---" + "|---:" * (len(counts) + 4) + "|",
    ]
    for name in rows:
        here = [c for c in cells if c["row"] == name]
        tenth = [_error([c["rounds"][j]["best_tenth"] for c in here]) for j in range(len(counts))]
        last = {key: [c["rounds"][-1][key] for c in here] for key in ("best", "mean", "edit_diversity")}
        spent = statistics.mean(c["cpu_seconds"] for c in here)
        ends = [_error(last["best"]), _error(last["mean"]), _error(last["edit_diversity"]), f"{spent:.0f}"]
        lines.append(f"| {name} ({len(here)} seeds) | {' | '.join([*tenth, *ends])} |")
    return [*lines, ""]


def write_page(cells: list[Cell]) -> str:
    """Write the page; returns its name."""
    parts = [
        "# Design of sequences",
        "",
        "Written by `OMP_NUM_THREADS=1 python -m benchmarks sequences --suite known|offline|online` (`--page`: only "
        "the page) from the cells in `benchmarks/results/sequences/`. What the tasks are, what is real in them and "
        "what is made: [the study](../design_study.md).",
        "",
        NOTES.read_text(encoding="utf-8").rstrip(),
        "",
    ]
    known = [c for c in cells if c["suite"] == "known"]
    for task in dict.fromkeys(c["task"] for c in known):
        parts += [f"## Known rewards: {task}", "", *_known([c for c in known if c["task"] == task])]
    offline = [c for c in cells if c["suite"] == "offline"]
    for row in dict.fromkeys(c["row"] for c in offline):
        here = [c for c in offline if c["row"] == row]
        parts += [f"## Learned from 256 measurements: {row}", "", *_offline(here)]
        parts += [f"True activity, mean and error over {len(here)} seeds of data and weights.", ""]
    online = [c for c in cells if c["suite"] == "online"]
    if online:
        parts += ["## Rounds of 48 measurements", "", *_online(online)]
    PAGE.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
    return PAGE.name
