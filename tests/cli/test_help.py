"""Help fits 80 columns, and the examples in it and on the page of the command line are commands that parse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from sdecontrol.cli import app
from sdecontrol.cli.common import paragraphs

GROUP: typer.core.TyperGroup = typer.main.get_command(app)  # type: ignore[assignment]
ROOT = Path(__file__).parents[2]
SMALL = ("--iterations", "2", "--time-steps", "5", "--paths", "64")


def examples(name: str) -> list[str]:
    """Those of a command's help, and where they are written in bold they are whole lines."""
    text = paragraphs(GROUP.commands[name].callback)  # type: ignore[arg-type]
    return re.findall(r"^Example: \[bold\](.*)\[/bold\]$", text, flags=re.MULTILINE)


def written() -> list[str]:
    """The commands of the pages."""
    pages = ("README.md", "docs/command_line.md", "docs/design_study.md", "docs/getting_started.md")
    blocks = [b for page in pages for b in re.findall(r"```(?:ba)?sh\n(.*?)```", (ROOT / page).read_text(), flags=re.S)]
    return [line.partition("#")[0].strip() for b in blocks for line in b.splitlines() if line.startswith("sdecontrol ")]


def parses(line: str) -> bool:
    """Whether all that a command is told exists; it is not run."""
    program, name, *arguments = shlex.split(line)
    command = GROUP.commands[name]
    context = command.make_context(name, arguments)
    return program == "sdecontrol" and context.info_name == name


@pytest.mark.parametrize("name", sorted(GROUP.commands))
def test_examples_of_the_help_parse_and_fit_a_line(name: str) -> None:
    assert examples(name)
    for line in examples(name):
        assert line.startswith(f"sdecontrol {name} ") and len(line) <= 69
        assert parses(line)


def test_commands_on_the_pages_parse() -> None:
    assert len(written()) > 7
    for line in written():
        assert parses(line)


@pytest.mark.parametrize("name", ["", *sorted(GROUP.commands)])
def test_help_fits_80_columns_without_broken_lines(name: str, run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    told = run(*([name] if name else []), "--help").stdout
    assert max(map(len, told.splitlines())) <= 80
    assert "Example: sdecontrol" in told
    for line in examples(name) if name else ():
        assert f" Example: {line}" in told  # on one line, to be copied


def test_the_table_of_compare_fits_a_terminal(run) -> None:
    from sdecontrol import AdjointMatching, compare, library

    problem = library.named_problem("ou-linear")
    table = compare(problem, [AdjointMatching()], time_steps=5, iterations=2, batch_size=64, n=64, seed=0)
    wide, narrow = str(table), table.text(80)
    head = narrow.partition("±")[0]
    assert max(len(line) for line in narrow.splitlines() if "--" in line) <= 80 < len(wide.splitlines()[0])
    assert head.startswith("method") and narrow.count("adjoint-matching  ") > 2
    numbers = [re.findall(r"\S+", text.partition("\n\n±")[0]) for text in (wide, narrow)]
    assert set(numbers[0]) >= set(numbers[1]) - {"-" * k for k in range(200)}
