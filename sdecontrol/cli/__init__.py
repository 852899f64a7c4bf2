"""The command line: ``sdecontrol COMMAND``. One file per command; each imports what it needs when it runs."""

import io
import sys

import typer

from .common import BAD_INPUT, INTERRUPTED, paragraphs, report
from .compare import compare
from .demo import demo
from .design import design
from .sample import sample
from .solve import solve
from .verify import verify

__all__ = ["app", "main"]

app = typer.Typer(
    name="sdecontrol",
    help="Continuous-time stochastic control in PyTorch: tune diffusion models, steer SDEs, sample densities, design "
    "sequences.\n\nExample: [bold]sdecontrol demo --quick[/bold]\n\nExample: [bold]sdecontrol solve --help[/bold]",
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


for _command in (demo, solve, sample, compare, design, verify):
    app.command(help=paragraphs(_command))(_command)


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "±" gets a "?" and no traceback
    try:
        sys.exit(app(standalone_mode=False))
    except Exception as error:
        if type(error).__name__ == "Abort":
            sys.exit(INTERRUPTED)
        if not hasattr(error, "format_message"):  # no error of the command line's own
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
        else:
            report(f"{error.format_message()} (see --help)")  # type: ignore[attr-defined]
        sys.exit(getattr(error, "exit_code", BAD_INPUT))
