"""The report of a run: a table on the terminal, JSON, Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .registry import FAMILY_WISE_ERROR, Measurement
from .runner import ControlOutcome, Outcome

__all__ = ["as_dict", "check_as_dict", "markdown", "outcome_of", "problems", "summary", "table"]


def _number(m: Measurement | None) -> str:
    if m is None:
        return "—"
    return f"p = {m.value:.1e}" if m.kind == "p" else f"{m.value:.1e}"


def _tolerance(m: Measurement | None) -> str:
    return "—" if m is None else f"p ≥ {m.tolerance:.0e}" if m.kind == "p" else f"{m.tolerance:.0e}"


def _compared(o: Outcome) -> str:
    return o.error if o.worst is None else f"{o.worst.what} (worst of {len(o.measurements)})"


def _control(c: ControlOutcome) -> str:
    return f"{c.defect}: {c.error}" if c.error else f"{c.defect}: {_number(c.worst)}" + ("" if c.caught else " PASSES")


def _controls(o: Outcome) -> str:
    if not o.controls:
        return "not run"
    slipped = [c for c in o.controls if not c.caught]
    if slipped:
        return "; ".join(_control(c) for c in slipped)
    nearest = min(o.controls, key=lambda c: c.worst.severity if c.worst is not None else math.inf)
    return f"all {len(o.controls)} fail; nearest {_control(nearest)}"


COLUMNS = ("", "statement", "check", "compared", "error or p", "tolerance", "negative controls", "time")


def _row(o: Outcome) -> tuple[str, ...]:
    return (
        "ok" if o.passed else "FAIL",
        o.statement,
        o.name,
        _compared(o),
        _number(o.worst),
        _tolerance(o.worst),
        _controls(o),
        f"{o.seconds:.1f} s",
    )


def table(outcomes: Sequence[Outcome]) -> Any:
    """A rich table."""
    from rich.table import Table
    from rich.text import Text

    out = Table(title="The theory, checked", show_lines=False, expand=True)
    for name, ratio in zip(COLUMNS, (4, 14, 16, 26, 10, 9, 24, 6)):
        out.add_column(name, ratio=ratio, overflow="fold", justify="right" if name == "time" else "left")
    for o in outcomes:
        cells = [Text(cell) for cell in _row(o)]
        cells[0].stylize("green" if o.passed else "bold red")
        out.add_row(*cells)
    return out


def problems(outcomes: Sequence[Outcome]) -> list[str]:
    """One line for everything that is wrong."""
    lines = []
    for o in outcomes:
        if o.error:
            lines.append(f"{o.name}: {o.error}")
        lines += [
            f"{o.name}: {m.what}: {_number(m)}, tolerance {_tolerance(m)}" for m in o.measurements if not m.passed
        ]
        lines += [
            f"{o.name}: the negative control {c.defect!r} {'broke down: ' + c.error if c.error else 'passes'}"
            for c in o.controls
            if not c.caught
        ]
    return lines


def summary(outcomes: Sequence[Outcome]) -> str:
    good = sum(o.passed for o in outcomes)
    controls = sum(len(o.controls) for o in outcomes)
    caught = sum(c.caught for o in outcomes for c in o.controls)
    tests = sum(m.kind == "p" for o in outcomes for m in o.measurements)
    return (
        f"{good} of {len(outcomes)} checks pass ({sum(len(o.measurements) for o in outcomes)} comparisons, {tests} of "
        f"them statistical tests with a family-wise error of {FAMILY_WISE_ERROR:g}); {caught} of {controls} negative "
        f"controls fail as they must; {sum(o.seconds for o in outcomes):.0f} s of computation."
    )


def _plain(m: Measurement | None) -> dict[str, Any] | None:
    if m is None:
        return None
    value = m.value if math.isfinite(m.value) else None
    return {"what": m.what, "kind": m.kind, "value": value, "tolerance": m.tolerance, "passed": m.passed}


def check_as_dict(o: Outcome) -> dict[str, Any]:
    """One check, for JSON."""
    return {
        "name": o.name,
        "statement": o.statement,
        "kind": o.kind,
        "doc": o.doc,
        "passed": o.passed,
        "holds": o.holds,
        "error": o.error or None,
        "seconds": o.seconds,
        "measurements": [_plain(m) for m in o.measurements],
        "controls": [
            {"defect": c.defect, "caught": c.caught, "error": c.error or None, "worst": _plain(c.worst)}
            for c in o.controls
        ],
    }


def outcome_of(kept: dict[str, Any]) -> Outcome:
    """The outcome of which :func:`check_as_dict` made this; a number that is not finite is nan."""
    controls = (
        ControlOutcome(c["defect"], c["worst"] and _measured(c["worst"]), c["error"] or "") for c in kept["controls"]
    )
    return Outcome(
        name=kept["name"],
        statement=kept["statement"],
        kind=kept["kind"],
        doc=kept["doc"],
        measurements=tuple(map(_measured, kept["measurements"])),
        controls=tuple(controls),
        seconds=kept["seconds"],
        error=kept["error"] or "",
    )


def _measured(m: dict[str, Any]) -> Measurement:
    return Measurement(m["what"], math.nan if m["value"] is None else m["value"], m["tolerance"], m["kind"])


def as_dict(outcomes: Sequence[Outcome], seed: int) -> dict[str, Any]:
    """Everything, for JSON."""
    return {
        "passed": all(o.passed for o in outcomes),
        "seed": seed,
        "family_wise_error": FAMILY_WISE_ERROR,
        "checks": [check_as_dict(o) for o in outcomes],
    }


def markdown(outcomes: Sequence[Outcome], run: dict[str, Any] | None = None) -> str:
    """The table in Markdown; ``run``: what it was made with, said below."""
    clean = lambda cell: cell.replace("|", "\\|")  # noqa: E731
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(clean(cell) for cell in _row(o)) + " |" for o in outcomes]
    made = [] if run is None else ["", "Made with " + ", ".join(f"{k} {v}" for k, v in run.items()) + "."]
    return "\n".join([*lines, "", summary(outcomes), *(f"* {line}" for line in problems(outcomes)), *made, ""])
