"""The command line: ``sdecontrol COMMAND``. One file per command; each imports what it needs when it runs."""

from __future__ import annotations

import io
import sys

import typer

from .demo import demo
from .solve import solve

__all__ = ["app", "main"]

app = typer.Typer(
    name="sdecontrol",
    help="Continuous-time stochastic control in PyTorch: tune diffusion models, steer SDEs, sample densities.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(show: bool) -> None:
    if show:
        from .. import __version__

        print(f"sdecontrol {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    pass


for _command in (demo, solve):
    app.command()(_command)


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "±" gets a "?" and no traceback
    app()
