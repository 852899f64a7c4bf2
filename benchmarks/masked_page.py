"""The page of the suite on masked diffusion, from its cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["write_page"]

PAGE = Path(__file__).parents[1] / "docs" / "tables" / "masked.md"
NOTES = PAGE.with_name("masked_notes.md")
BAR = 0.02  # nats above the floor
Cell = dict[str, Any]
_TITLES = {
    ("4x3", "random"): "4 tokens of 3 letters, one position a step",
    ("4x3", "independent"): "4 tokens of 3 letters, each by itself, 32 steps",
    ("8x4", "random"): "8 tokens of 4 letters, one position a step",
}


def _table(cells: list[Cell]) -> list[str]:
    lines = [
        "| method | batch | iterations | CPU-s | gap | above floor | within 0.02 | TV of samples | by exact draws' |",
        "|---|---:|---:|---:|---:|---:|---|---:|---:|",
    ]
    for cell in sorted(cells, key=lambda c: c["gap"]):
        above = cell["gap"] - cell["floor"]
        reached = "yes" if above <= BAR else "no"
        spent = f"{cell.get('batch_size', 256)} | {cell['iterations']} | {cell['cpu_seconds']:.0f}"
        away = f"{cell['tv']:.3f} | {cell['tv'] / cell['tv_exact']:.2f}" if "tv" in cell else "– | –"
        lines.append(f"| {cell['method']} | {spent} | {cell['gap']:.4f} | {above:.4f} | {reached} | {away} |")
    known = cells[0]
    return [*lines, "", f"Floor {known['floor']:.4f}; the untuned model has {known['untuned']:.3f}.", ""]


def write_page(cells: list[Cell]) -> str:
    """Write the page; returns its name."""
    parts = [
        "# Masked diffusion, exactly",
        "",
        "How near every method comes to the exact tilt of a masked diffusion. The model has the conditionals of a "
        "known law, a Markov chain of letters; the reward is a sum over words of three letters, two nats of tilt. The "
        "control is the default network of tokens. The gap, `KL(P^u || Q_fine)`, is exact: a recursion "
        "over all states, no estimate. In random order, one position a step, tilts of tokens reach the tilt: the floor "
        "is 0. Where positions are unmasked by themselves in 8 steps a position a floor stays, which "
        "`exact_solution(...).floor` knows, that of the best product in every state. `python -m benchmarks masked` "
        "runs a cell; CPU-s are of training, one thread. TV is the total variation of 4096 samples from the exact law "
        "of the end, beside that of as many exact draws, the mean of twenty (where it was measured).",
        "",
        NOTES.read_text().rstrip(),
        "",
    ]
    for (size, order), title in _TITLES.items():
        here = [c for c in cells if (c["size"], c["order"]) == (size, order)]
        if here:
            parts += [f"## {title}", "", *_table(here)]
    PAGE.write_text("\n".join(parts).rstrip() + "\n")
    return PAGE.name
