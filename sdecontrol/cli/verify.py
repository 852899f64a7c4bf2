"""``sdecontrol verify``: the theory verification suite."""

from typing import Annotated

import typer


def verify(
    only: Annotated[
        list[str] | None, typer.Option(help="Run only checks whose name contains this; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random problems and of the noise.")] = 0,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="More random problems, more paths, every solver.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
    markdown: Annotated[str | None, typer.Option(help="Write the table as Markdown to this file.")] = None,
    figure: Annotated[str | None, typer.Option(help="Write a figure to this file.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: two, or one for a single check.")] = 0,
) -> None:
    """Check the theory numerically: every statement of the tutorial, each with negative controls.

    The exit status is not zero if a statement fails, or if a negative control does not.

    Example: [bold]sdecontrol verify --only theorem-2 --seed 1[/bold]
    """
    from pathlib import Path

    from theory_checks.command import verify_command

    verify_command(
        only=only,
        seed=seed,
        thorough=thorough,
        controls=True,
        workers=workers,
        as_json=as_json,
        markdown=Path(markdown) if markdown else None,
        figure=Path(figure) if figure else None,
        docs=None,
        list_checks=False,
    )
