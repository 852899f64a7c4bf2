"""The command line of the suite: ``python -m theory_checks`` and ``sdecontrol verify``."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from .record import Record
    from .registry import Check, Setting
    from .runner import Outcome

__all__ = ["main", "verify_command"]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _report(outcomes: Sequence, as_json: bool, seed: int, elapsed: float) -> None:
    from rich.console import Console

    from . import report

    if as_json:
        print(json.dumps(report.as_dict(outcomes, seed), indent=1))
        return
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(report.table(outcomes))
    for line in report.problems(outcomes):
        console.print(line, style="red", markup=False)
    console.print(report.summary(outcomes) + f" {elapsed:.0f} s on the clock.", markup=False)


def verify_command(
    only: Annotated[
        list[str] | None, typer.Option(help="Run only checks whose name contains this; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random problems and of the noise.")] = 0,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="More random problems, more paths, every solver.")
    ] = False,
    controls: Annotated[bool, typer.Option(help="Run the negative controls, on which each check must fail.")] = True,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: two, or one for a single check.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
    markdown: Annotated[Path | None, typer.Option(help="Write the table as Markdown to this file.")] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl", help="Keep outcomes in this file as they come; what passed there is not run again."
        ),
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Write a figure (convergence, marginals, fixed-start bias) to this file.")
    ] = None,
    docs: Annotated[
        Path | None, typer.Option(help="Write the page that maps equations to functions and checks, and stop.")
    ] = None,
    list_checks: Annotated[bool, typer.Option("--list", help="List the checks and stop.")] = False,
) -> None:
    """Check the theory numerically: Theorems 1-3, lemmas, corollaries, estimators and errata, each with negative
    controls.

    Example: python -m theory_checks --only theorem-2 --seed 1
    """
    from . import report
    from .record import Record, run_of
    from .registry import Setting, select

    if docs is not None:
        from .page import page

        _write(docs, page())
        return
    try:
        checks = select(only or [])
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--only") from error
    if list_checks:
        for check in checks:
            print(f"{check.name:34} {check.statement:42} {len(check.controls)} controls")
        return
    began, setting = time.perf_counter(), Setting(seed, thorough)
    run = run_of(setting, controls)
    try:
        kept = None if record is None else Record(record, run)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--record") from error
    outcomes = _outcomes(checks, setting, controls, workers, kept, as_json)
    _report(outcomes, as_json, seed, time.perf_counter() - began)
    if markdown is not None:
        _write(markdown, report.markdown(outcomes, run))
    if figure is not None:
        from .figure import draw

        figure.parent.mkdir(parents=True, exist_ok=True)
        draw(figure, seed)
    good = all((o.passed if controls else o.holds) for o in outcomes)
    raise typer.Exit(0 if good else 1)


def _outcomes(
    checks: Sequence[Check], setting: Setting, controls: bool, workers: int, kept: Record | None, quiet: bool
) -> list[Outcome]:
    """Of all checks, in their order: those that a record has, and the others, which are run and kept."""
    from .runner import run

    known = {} if kept is None else kept.known
    left = [c for c in checks if c.name not in known]
    show = _progress(len(left), quiet)

    def done(outcome: Outcome) -> None:
        if kept is not None:
            kept.add(outcome)
        show(outcome)

    workers = workers or (1 if len(left) == 1 else min(2, os.cpu_count() or 1))
    found = {o.name: o for o in run(left, setting, workers=workers, controls=controls, progress=done)}
    return [known.get(c.name) or found[c.name] for c in checks]


def _progress(total: int, quiet: bool) -> Callable[[Outcome], None]:
    """One line that says how far the run is, on a terminal."""
    if quiet or not sys.stderr.isatty():
        return lambda outcome: None
    done: list[Outcome] = []

    def show(outcome: Outcome) -> None:
        done.append(outcome)
        failed = sum(not o.passed for o in done)
        print(f"\r{len(done)}/{total} checks, {failed} failed: {outcome.name:40}", end="", file=sys.stderr, flush=True)
        if len(done) == total:
            print(file=sys.stderr)

    return show


def main() -> None:
    typer.run(verify_command)
