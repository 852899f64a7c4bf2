"""What the commands share: errors as one line, results as a table or as JSON, common options."""

import functools
import json
import math
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the results as JSON on standard output, and nothing else.")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same numbers.")]
OwnSeedOption = Annotated[
    int | None, typer.Option("--seed", min=0, help="The same seed gives the same numbers.", show_default="0")
]
ProblemArgument = Annotated[
    str,
    typer.Argument(metavar="NAME|FILE.toml", help="A named problem, or a problem in a TOML file."),
]
StepsOption = Annotated[int | None, typer.Option(min=1, help="Steps of the chain.", show_default="the problem's")]
BatchOption = Annotated[int | None, typer.Option(min=1, help="Paths per gradient.", show_default="the problem's")]
SaveOption = Annotated[Path | None, typer.Option(metavar="DIR", help="Save the solution in this folder.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

Command = TypeVar("Command", bound=Callable[..., None])

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
FIGURES = (".png", ".pdf", ".svg")


def handles_errors(command: Command) -> Command:
    """Errors as one line on standard error: exit code 2 for bad input, 1 for a failure, no traceback unless
    ``debug``."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            from .. import public  # noqa: F401  (registers every method and kind; torch comes with it)

            command(*args, **kwargs)
        except KeyboardInterrupt:
            report("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise
        except Exception as error:
            if isinstance(error, (typer.Exit, typer.Abort)) or type(error).__module__.startswith(("click", "typer")):
                raise
            if kwargs.get("debug"):
                traceback.print_exc()
            bad_input = isinstance(error, (ValueError, TypeError, FileNotFoundError))
            known = bad_input or isinstance(error, (RuntimeError, OSError, ImportError))
            report(str(error) if known and str(error) else f"{type(error).__name__}: {error} (--debug shows where)")
            raise typer.Exit(BAD_INPUT if bad_input else FAILED) from None

    return run  # type: ignore[return-value]


def report(message: str) -> None:
    """An error as one red line on standard error."""
    from rich.console import Console

    line = " ".join(message.split())
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {line}", style="bold red", markup=False)


def check_file(option: str, path: Path | None, suffixes: tuple[str, ...]) -> None:
    """Raise before the work is done where its result could not be written."""
    if path is None:
        return
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{option} must be a {', '.join(suffixes[:-1])} or {suffixes[-1]} file, got {path.name!r}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{option}: the folder {path.parent} cannot be written to.")


def given(**options: Any) -> dict[str, Any]:
    """The options that are given, not None."""
    return {name: value for name, value in options.items() if value is not None}


def note(message: str) -> None:
    """One line of progress or advice on standard error."""
    print(message, file=sys.stderr, flush=True)


def print_json(result: Any) -> None:
    """Strict JSON on standard output: numbers that are not finite become null."""
    print(json.dumps(plain(result), indent=2, allow_nan=False))


def plain(value: Any) -> Any:
    """``value`` with every number that JSON cannot hold as None."""
    if isinstance(value, dict):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def columns() -> int | None:
    """Characters of a line of the terminal; None where the output goes to a file or another program."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_text(text: str) -> None:
    """Text on standard output; on a terminal, lines that are too long go on below, indented."""
    width = columns() or sys.maxsize
    for line in text.splitlines():
        print(line if len(line) <= width else "\n".join(textwrap.wrap(line, width, subsequent_indent="    ")))


def paragraphs(command: Callable[..., None]) -> str:
    """A command's docstring with each paragraph in one line, so that the terminal alone decides where lines end."""
    return "\n\n".join(" ".join(part.split()) for part in (command.__doc__ or "").split("\n\n"))


def print_table(title: str, columns: Iterable[str], rows: Iterable[tuple[str, ...]], notes: Iterable[str] = ()) -> None:
    """A table on standard output, and notes below it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 120  # a file is not cut to 80 columns
    console = Console(highlight=False, width=width)
    console.print(table)
    print_text("\n".join(notes))
