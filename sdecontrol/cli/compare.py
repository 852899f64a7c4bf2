"""``sdecontrol compare``: several methods on one problem, as one table."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    BatchOption,
    DebugOption,
    JsonOption,
    OwnSeedOption,
    ProblemArgument,
    StepsOption,
    columns,
    given,
    handles_errors,
    note,
    print_json,
    print_text,
)


@handles_errors
def compare(
    problem: ProblemArgument,
    methods: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Methods by name.", show_default="recommend's first three")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings per method; errors are then between them.")] = 1,
    iterations: Annotated[
        int | None,
        typer.Option(
            min=1, help="Exactly so many for each method that trains.", show_default="until it stops improving"
        ),
    ] = None,
    budget: Annotated[str | None, typer.Option(metavar="TIME", help="Stop each training there: 60s, 5m.")] = None,
    time_steps: StepsOption = None,
    batch_size: BatchOption = None,
    paths: Annotated[int, typer.Option(min=64, help="Paths and samples of each evaluation.")] = 4096,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Write reward against KL, with the exact frontier if known.")
    ] = None,
    seed: OwnSeedOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Solve one problem by several methods; one table of errors, reward, KL, gap and costs. Names and files: see solve
    --help.

    A method that refuses the problem, or diverges, is a row with its reason. Calls are rows; memory is the peak above
    what was in use before.

    Example: [bold]sdecontrol compare ou-linear --methods socm,soft-ppo --iterations 100[/bold]

    Example: [bold]sdecontrol compare problem.toml --seeds 3 --budget 30s --json[/bold]
    """
    from ..comparison.compare import compare as put_side_by_side
    from .solve import problem_of

    made, defaults, name = problem_of(problem)
    shared = ("iterations", "time_steps", "batch_size", "scheme")
    settings: dict[str, Any] = {key: v for key, v in defaults.items() if key in shared}
    settings.update(given(iterations=iterations, budget=budget, time_steps=time_steps, batch_size=batch_size))
    first = seed if seed is not None else int(defaults.get("seed", 0))
    chosen = None if methods is None else [m.strip() for m in methods.split(",") if m.strip()]
    result = put_side_by_side(made, chosen, seeds=seeds, seed=first, n=paths, progress=None, **settings)
    if figure is not None:
        result.figure()[0].savefig(figure)
    if as_json:
        print_json(
            {
                "problem": name,
                "settings": settings,
                **result.as_dict(),
                "figure": None if figure is None else str(figure),
            }
        )
        return
    print_text(f"{name}\n\n{result.text(columns())}")
    if figure is not None:
        note(f"figure in {figure}")
