"""``sdecontrol solve``: a named problem, or one in a TOML file."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    FIGURES,
    BatchOption,
    DebugOption,
    JsonOption,
    OwnSeedOption,
    ProblemArgument,
    SaveOption,
    StepsOption,
    check_file,
    given,
    handles_errors,
    note,
    print_json,
    print_text,
)

if TYPE_CHECKING:
    from ..evaluation.solution import Solution
    from ..problems.problem import ControlProblem


@handles_errors
def solve(
    problem: ProblemArgument,
    method: Annotated[str | None, typer.Option(help="The method.", show_default="recommend's first choice")] = None,
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Exactly so many; else until it stops improving.")
    ] = None,
    time_steps: StepsOption = None,
    batch_size: BatchOption = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of Adam.", show_default="the control's")] = None,
    paths: Annotated[int, typer.Option(min=64, help="Paths of the evaluation.")] = 4096,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Write a figure: paths, control, what is spent, value.")
    ] = None,
    save: SaveOption = None,
    seed: OwnSeedOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Solve a control problem and evaluate the solution, beside the exact one where that is known.

    Named problems: ou-quadratic-easy, ou-quadratic-hard, ou-linear,
    double-well, kuramoto, pendulum-torque and others
    (docs/control_problems.md). A TOML file states a linear-quadratic problem:
    [bold]\\[sde][/bold] A, sigma, offset, horizon; [bold]\\[initial][/bold] point, or mean and cov;
    [bold]\\[reward][/bold] G, g; [bold]\\[running_cost][/bold] F; alpha; [bold]\\[solve][/bold] time_steps and
    other settings. Or it names a Python object that is one, or a function
    that makes one: [bold]\\[problem][/bold] function = "module:object" (its code runs).

    Example: [bold]sdecontrol solve ou-quadratic-easy --iterations 500 --seed 0[/bold]

    Example: [bold]sdecontrol solve double-well-1d --figure solution.png[/bold]

    Example: [bold]sdecontrol solve problem.toml --save runs/first --json[/bold]
    """
    from ..training import solve as training

    check_file("--figure", figure, FIGURES)
    made, defaults, name = problem_of(problem)
    settings: dict[str, Any] = {
        "seed": 0,
        **defaults,
        **given(method=method, iterations=iterations, time_steps=time_steps, batch_size=batch_size),
        **given(learning_rate=learning_rate, seed=seed),
    }
    began = time.monotonic()
    solution = training.solve(made, progress=True, **settings)
    seconds = time.monotonic() - began
    evaluation = solution.evaluate(paths, seed=settings["seed"])
    exact = _exact(solution, paths)
    if save is not None:
        solution.save(save)
    if figure is not None:
        drawn, _ = solution.plot(seed=settings["seed"], title=f"{name}: {solution.method}")
        drawn.savefig(figure, facecolor="white")
    if as_json:
        print_json(
            {
                "problem": name,
                "settings": {"method": solution.method, **settings},
                "reason": solution.details.get("reason"),
                "iterations": solution.iterations,
                "seconds": seconds,
                "evaluation": evaluation.as_dict(),
                "exact": exact,
                "saved": None if save is None else str(save),
                "figure": None if figure is None else str(figure),
            }
        )
        return
    print(f"{name}, {solution.method}, {solution.iterations} iterations, {seconds:.1f} s\n")
    print_text(str(evaluation))
    _print_exact(exact)
    if save is not None:
        note(f"saved in {save}")
    if figure is not None:
        note(f"figure in {figure}")


def problem_of(text: str) -> tuple[ControlProblem, dict[str, Any], str]:
    """The problem, its default settings, and its name."""
    from ..library.problems import problem_card
    from .problem_file import read_problem_file

    if text.lower().endswith(".toml"):
        made, settings = read_problem_file(Path(text))
        return made, settings, text
    card = problem_card(text)
    return card.make(), {"time_steps": card.time_steps, "batch_size": card.batch_size}, card.name


def _exact(solution: Solution, paths: int) -> dict[str, Any] | None:
    """What the exact solutions say, of the chain and in continuous time; None where none is known."""
    from ..errors import NoExactSolution
    from ..evaluation.metrics import control_error
    from ..exact import exact_solution

    out: dict[str, Any] = {}
    for name, chain in (("discretised", solution), ("continuous", None)):
        try:
            exact = exact_solution(solution.problem, like=chain)
        except NoExactSolution:
            continue
        error = control_error(solution, exact, n=paths)
        out[name] = {
            "log_z": float(exact.log_z),
            "elbo": float(exact.start_log_z),
            "control_error": asdict(error.absolute),
            "relative_control_error": asdict(error.relative),
        }
    return out or None


def _print_exact(exact: dict[str, Any] | None) -> None:
    from ..evaluation.estimates import Estimate

    if exact is None:
        print("\nexact         not known for this problem")
        return
    titles = {"discretised": "of the chain", "continuous": "in continuous time"}
    for name, found in exact.items():
        absolute, relative = (Estimate(**found[key]) for key in ("control_error", "relative_control_error"))
        print(f"\nexact solution {titles[name]}")
        print(f"log Z         {found['log_z']:.6g}")
        if abs(found["elbo"] - found["log_z"]) > 1e-12:
            print(f"largest ELBO  {found['elbo']:.6g}  (the random start is fixed)")
        print(f"control error {absolute}, relative {relative}  E|u - u*|^2 on optimal paths")
