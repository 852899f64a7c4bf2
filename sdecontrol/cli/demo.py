"""``sdecontrol demo``: a real diffusion model, tuned towards a reward, with the exact answer beside it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    FIGURES,
    DebugOption,
    JsonOption,
    SeedOption,
    check_file,
    given,
    handles_errors,
    note,
    plain,
    print_json,
    print_table,
)


@handles_errors
def demo(
    label: Annotated[int, typer.Option(min=0, max=9, help="The digit to tune the model towards.")] = 3,
    output: Annotated[Path, typer.Option(help="The figure; a JSON file with the numbers is written beside it.")] = Path(
        "output/demo.png"
    ),
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Iterations of the distillation.", show_default="1000")
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="Tiny settings: shows in seconds that everything runs, not more.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of torch.")] = 1,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Tilt a diffusion model of handwritten digits towards one digit, and compare with the exactly tilted law.

    Trains (or takes from its cache) a noise-prediction model and a
    classifier on scikit-learn's 8x8 digits; fits a value to the model's own
    samples that guides it towards log p(label | x), staying close to it in
    KL; then distills the guidance into one tuned copy of the model, which
    asks for no reward. With alpha = 1 the optimum is the model's own
    conditional law p(x | label), which importance sampling from the untuned
    model gives too.

    Example: [bold]sdecontrol demo --label 3 --output output/demo.png[/bold]
    """
    from .demo_figure import draw_figure
    from .demo_run import FULL, QUICK, run_demo

    check_file("--output", output, FIGURES)
    settings = replace(QUICK if quick else FULL, **given(iterations=iterations))
    result = run_demo(label, seed, settings, threads)
    draw_figure(result, output)
    numbers = result.as_dict()
    output.with_suffix(".json").write_text(json.dumps(plain(numbers), indent=1) + "\n")
    if as_json:
        print_json(numbers)
        return
    title, columns = (
        f"Digits tilted towards log p({label} | x), alpha = 1",
        ("", "before", "guided", "one network", "exact tilt"),
    )
    print_table(title, columns, result.rows(), result.notes())
    note(f"wrote {output} and {output.with_suffix('.json')}")
