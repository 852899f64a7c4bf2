"""``sdecontrol design``: a task of sequence design whose activity is unknown, a few measurements at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    FIGURES,
    DebugOption,
    JsonOption,
    SeedOption,
    check_file,
    handles_errors,
    note,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..comparison.design import Design
    from ..library.sequences import SequenceTask

_LOGO = 60  # letters, up to which sequences that are not aligned have a logo worth drawing


@handles_errors
def design(
    task: Annotated[str, typer.Option(help="dna-8mer, dna-enhancer or rna-utr.")] = "dna-8mer",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of measurements.")] = 4,
    batch: Annotated[int, typer.Option(min=1, help="Measurements of a round.")] = 96,
    method: Annotated[str, typer.Option(help="By which the model is tuned.")] = "log-variance",
    propose: Annotated[str, typer.Option(help="optimistic, mean or thompson.")] = "optimistic",
    beta: Annotated[float, typer.Option(help="Spreads of the bonus, of optimistic.")] = 1.0,
    alpha: Annotated[
        float | None, typer.Option(help="Temperature: the price of KL.", show_default="the task's")
    ] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Of each tuning.")] = 100,
    fit_iterations: Annotated[int, typer.Option(min=1, help="Of each regressor.")] = 300,
    batch_size: Annotated[int, typer.Option(min=1, help="Paths per gradient.")] = 128,
    designs: Annotated[int, typer.Option(min=2, help="Sequences drawn from the tuned model in the end.")] = 256,
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep every measurement there, and go on from what it has.")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Write a figure: measurements by round, and sequence logos.")
    ] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Design DNA or RNA whose activity must be measured: propose, measure, learn, tune, round by round.

    The task plays the laboratory: its activity is asked for proposals alone, each counted, and in the end for what the
    tuned model draws, to judge it. What of a task is real and what is made is said with the results. Needs the extra
    bio.

    Example: [bold]sdecontrol design --task dna-8mer --figure designs.png[/bold]

    Example: [bold]sdecontrol design --task rna-utr --rounds 3 --folder run/ --json[/bold]
    """
    from ..comparison.design import design as run_design
    from ..library.sequences import sequence_task
    from ..problems.problem import ControlProblem

    check_file("--figure", figure, FIGURES)
    chosen = sequence_task(task)
    temperature = chosen.card.alpha if alpha is None else alpha
    found = run_design(
        ControlProblem(chosen.reference, alpha=temperature),
        _told(chosen),
        rounds=rounds,
        batch=batch,
        method=method,
        propose=propose,
        beta=beta,
        folder=folder,
        seed=seed,
        fit={"iterations": fit_iterations},
        train={"iterations": iterations, "batch_size": batch_size},
    )
    assert found.solution is not None
    x = found.solution.sample(designs, seed=seed)
    if figure is not None:
        draw_designs(chosen, found, x).savefig(figure, dpi=150)
    result = {
        "task": {"name": task, "version": chosen.card.version, "real": chosen.card.real, "made": chosen.card.made},
        "settings": {"alpha": temperature, "method": method, "propose": propose, "beta": beta, "seed": seed},
        **judged(chosen, found, x),
        "figure": None if figure is None else str(figure),
    }
    if as_json:
        print_json(result)
        return
    _show(chosen, found, result)
    if figure is not None:
        note(f"figure in {figure}")


def _told(task: SequenceTask) -> Any:
    """The laboratory, which says what it measures."""

    def oracle(x: Tensor) -> Tensor:
        r = task.reward(x)
        note(f"measured {len(r)}: mean {float(r.mean()):.3g}, best {float(r.max()):.3g}")
        return r

    return oracle


def judged(task: SequenceTask, found: Design, x: Tensor) -> dict[str, Any]:
    """What was measured, and what the tuned model draws: its true activity, how natural and how various it is."""
    from ..evaluation.sequence_metrics import edit_diversity

    best, values = found.best(5)
    r, natural = task.reward(x), task.naturalness(x)
    own = task.reward(task.natural(len(x), seed=1))
    return {
        "rounds": found.table(),
        "best": [{"sequence": s, "activity": float(v)} for s, v in zip(task.decode(best), values)],
        "learned": str(found.reward.calibration) if found.reward is not None else None,
        "designs": {
            "activity": float(r.mean()),
            "natural_activity": float(own.mean()),
            "unique_share": len(x.unique(dim=0)) / len(x),
            "edit_diversity": edit_diversity(x),
            "kmer_correlation": natural.kmer_correlation,
            "log_likelihood": natural.log_likelihood,
            "natural_log_likelihood": natural.natural_log_likelihood,
        },
    }


def _show(task: SequenceTask, found: Design, result: dict[str, Any]) -> None:
    drawn = result["designs"]
    rows = [
        (f"{row['round'] + 1:g}", f"{row['measured']}", f"{row['mean']:.3g}", f"{row['best_tenth']:.3g}",
         f"{row['best']:.4g}") for row in found.table()
    ]  # fmt: skip
    notes = [
        "best measured: " + ", ".join("{sequence} {activity:.4g}".format(**row) for row in result["best"][:3]),
        f"learned: {result['learned']}",
        f"the tuned model draws a mean activity of {drawn['activity']:.3g} (natural {drawn['natural_activity']:.3g}), "
        f"{drawn['unique_share']:.0%} unique, edit diversity {drawn['edit_diversity']:.2f}, 3-mer correlation "
        f"{drawn['kmer_correlation']:.2f}, log likelihood {drawn['log_likelihood']:.3f} a letter (natural "
        f"{drawn['natural_log_likelihood']:.3f})",
        f"real: {task.card.real}; made: {task.card.made}",
    ]
    print_table(task.name, ("round", "measured", "mean", "best 10 %", "best so far"), rows, notes)


def draw_designs(task: SequenceTask, found: Design, x: Tensor) -> Any:
    """Measured activities by round and, of short sequences, logos of natural ones, of the best tenth that was measured,
    and of what the tuned model draws; of long ones the activities of both. Returns the figure."""
    from matplotlib.figure import Figure

    from ..library.logos import draw_logo

    table, natural = found.table(), task.natural(len(x), seed=1)
    short = task.length <= _LOGO
    made = Figure(figsize=(8, 7 if short else 5), layout="constrained")
    axes = made.subplots(4 if short else 2, 1)
    for key, label in (("best", "best so far"), ("best_tenth", "best tenth"), ("mean", "mean")):
        axes[0].plot([row["measured"] for row in table], [row[key] for row in table], marker="o", label=label)
    axes[0].set(xlabel="measurements", ylabel="activity", title=f"{task.name}: measured, round by round")
    axes[0].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    if short:
        best = found.best(max(2, len(found.r) // 10))[0]
        for ax, (name, rows) in zip(
            axes[1:], {"natural": natural, "the best tenth measured": best, "drawn by the tuned model": x}.items()
        ):
            draw_logo(rows, task.alphabet, ax)
            ax.set_title(name)
        return made
    for name, rows in (("natural", natural), ("drawn by the tuned model", x)):
        axes[1].hist(task.reward(rows).numpy(), bins=30, alpha=0.6, label=name)
    axes[1].set(xlabel="activity", ylabel="sequences")
    axes[1].legend(frameon=False)
    return made
