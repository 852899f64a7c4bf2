"""``python -m benchmarks SUITE ...``: one suite per module."""

from __future__ import annotations

import typer

from .amortised import amortised
from .control import control
from .default_runs import default_runs
from .digits import digits
from .digits_floor import digits_floor
from .few_evaluations import few_evaluations
from .gibbs import gibbs
from .grids import grids
from .identity import identity
from .imports import imports
from .masked import masked
from .methods import methods
from .mixture import mixture
from .mutants.command import mutants
from .optimum import optimum
from .orders import orders
from .pictures import pictures
from .posteriors import posteriors
from .receding_horizon import receding_horizon
from .sequences import sequences
from .speed.command import speed
from .systems import systems
from .tutorials import tutorials
from .unet import unet_suite
from .verdicts import verdicts

app = typer.Typer(
    help="Benchmarks of sdecontrol, whose finished cells are kept in benchmarks/results/. Set OMP_NUM_THREADS=1: all "
    "figures are of one thread.\n\nExample: python -m benchmarks pictures",
    add_completion=False,
    no_args_is_help=True,
)
app.command()(amortised)
app.command()(control)
app.command()(default_runs)
app.command()(digits)
app.command()(digits_floor)
app.command("few-evaluations")(few_evaluations)
app.command()(gibbs)
app.command()(grids)
app.command()(identity)
app.command()(imports)
app.command()(masked)
app.command()(methods)
app.command()(mixture)
app.command()(mutants)
app.command()(optimum)
app.command()(orders)
app.command()(pictures)
app.command()(posteriors)
app.command("receding-horizon")(receding_horizon)
app.command()(sequences)
app.command()(speed)
app.command()(systems)
app.command()(tutorials)
app.command("unet")(unet_suite)
app.command()(verdicts)


@app.callback()
def _suites() -> None:
    pass


if __name__ == "__main__":
    app()
