"""``python -m benchmarks tutorials``: the tutorials of ``docs/tutorials/``, run; pages with what they print and draw.

A tutorial is a notebook in jupytext's percent format. Its cell of parameters says in its metadata with which numbers it
runs in small, for the tests. A cell that draws binds ``figure``.
"""

from __future__ import annotations

import contextlib
import io
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

FOLDER = Path(__file__).parents[1] / "docs" / "tutorials"


@dataclass(frozen=True)
class Done:
    """A cell that has run: its kind, "markdown" or "code", its text, what it printed, the figure it made."""

    kind: str
    text: str
    printed: str = ""
    figure: Any = None


def names() -> list[str]:
    """All tutorials."""
    return sorted(path.stem for path in FOLDER.glob("*.py"))


def cells(name: str) -> list[Any]:
    """The cells of a tutorial, as nbformat has them."""
    import jupytext

    return jupytext.read(FOLDER / f"{name}.py", fmt="py:percent").cells


def run(name: str, small: bool = False) -> Iterator[Done]:
    """Run a tutorial cell after cell, in small with the numbers that its cell of parameters has for that."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    own: dict[str, Any] = {"__name__": name}
    for number, cell in enumerate(cells(name)):
        if cell.cell_type == "markdown":
            yield Done("markdown", cell.source)
            continue
        heard = io.StringIO()
        with contextlib.redirect_stdout(heard):
            exec(compile(cell.source, f"{name}.py, cell {number}", "exec", dont_inherit=True), own)
        if small and "parameters" in cell.metadata.get("tags", []):
            own.update(cell.metadata["small"])
        yield Done("code", cell.source, heard.getvalue().rstrip(), own.pop("figure", None))
        plt.close("all")


def page(name: str, done: Iterator[Done]) -> Iterator[tuple[str, Any]]:
    """The parts of a tutorial's page: text, and the figure it shows, if any."""
    drawn = 0
    for cell in done:
        if cell.kind == "markdown":
            yield cell.text, None
            continue
        yield f"```python\n{cell.text}\n```", None
        if cell.printed:
            lines = (textwrap.wrap(line, 100, subsequent_indent="    ") or [""] for line in cell.printed.splitlines())
            yield "```text\n" + "\n".join(part for line in lines for part in line) + "\n```", None
        if cell.figure is not None:
            drawn += 1
            yield f"![figure {drawn} of this tutorial](images/{name}_{drawn}.png)", cell.figure


def write(name: str) -> float:
    """Run a tutorial at its own size and write its page and figures; the CPU-seconds it took."""
    began = time.process_time()
    parts = []
    for text, figure in page(name, run(name)):
        parts.append(text)
        if figure is not None:
            place = FOLDER / text.rpartition("(")[2].rstrip(")")
            place.parent.mkdir(exist_ok=True)
            figure.savefig(place, dpi=100, facecolor="white")
    seconds = time.process_time() - began
    parts.append(
        f"*Made by `python -m benchmarks tutorials {name}` in {seconds:.0f} CPU-seconds of one thread; do not edit. "
        f"The source is [{name}.py]({name}.py), the notebook [{name}.ipynb]({name}.ipynb).*"
    )
    (FOLDER / f"{name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return seconds


def tutorials(
    chosen: Annotated[list[str] | None, typer.Argument(help="Names; without any: all.")] = None,
) -> None:
    """Run the tutorials and write their pages, docs/tutorials/NAME.md, with their figures.

    Example: python -m benchmarks tutorials own_method
    """
    unknown = set(chosen or ()) - set(names())
    if unknown:
        raise typer.BadParameter(f"no tutorials: {', '.join(sorted(unknown))}; there are {', '.join(names())}.")
    for name in chosen or names():
        print(f"{name}: {write(name):.0f} CPU-seconds")
