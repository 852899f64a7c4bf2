"""Help fits 80 columns, its examples run, and the commands on the pages parse."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.__main__ import app as benchmarks
from sdecontrol.cli import app, common
from sdecontrol.cli.common import paragraphs

GROUP: typer.core.TyperGroup = typer.main.get_command(app)  # type: ignore[assignment]
BENCHMARKS: typer.core.TyperGroup = typer.main.get_command(benchmarks)  # type: ignore[assignment]
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/command_line.md").read_text(encoding="utf-8")


def examples(name: str = "") -> list[str]:
    """Those of a command's help, or of the program's own; where they are written in bold they are whole lines."""
    text = paragraphs(GROUP.commands[name].callback) if name else app.info.help  # type: ignore[arg-type]
    return re.findall(r"^Example: \[bold\](.*)\[/bold\]$", str(text), flags=re.MULTILINE)


def in_small(name: str) -> list[str]:
    """What the page says to append to a command for a run of seconds."""
    return re.findall(rf"^\| `sdecontrol {name}` \|.*\| (?:`(.*)`)? \|$", PAGE, flags=re.MULTILINE)[0].split()


def written_on_the_page(folder: Path) -> None:
    """The files that the page prints, which the examples name."""
    for name, language in (("problem.toml", "toml"), ("my_model.py", "python")):
        (folder / name).write_text(re.findall(rf"^`{name}`:\n\n```{language}\n(.*?)```", PAGE, flags=re.M | re.S)[0])


def written() -> list[str]:
    """The commands of the pages."""
    pages = ("README.md", "docs/command_line.md", "docs/design_study.md", "docs/getting_started.md")
    blocks = [b for page in pages for b in re.findall(r"```(?:ba)?sh\n(.*?)```", (ROOT / page).read_text(), flags=re.S)]
    return [line.partition("#")[0].strip() for b in blocks for line in b.splitlines() if line.startswith("sdecontrol ")]


def parses(line: str, program: str = "sdecontrol", group: typer.core.TyperGroup = GROUP) -> bool:
    """Whether all that a command is told exists; it is not run."""
    assert line.startswith(program)
    name, *arguments = shlex.split(line.removeprefix(program))
    context = group.commands[name].make_context(name, arguments)
    return context.info_name == name


@pytest.mark.parametrize("name", sorted(GROUP.commands))
def test_examples_of_the_help_parse_and_fit_a_line(name: str) -> None:
    assert examples(name)
    for line in examples(name):
        assert line.startswith(f"sdecontrol {name} ") and len(line) <= 69
        assert parses(line)


EXAMPLES = [(name, line) for name in ["", *sorted(GROUP.commands)] for line in examples(name)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "line"), EXAMPLES, ids=[line.replace("/", "-") for _, line in EXAMPLES])
def test_examples_of_the_help_run(name: str, line: str, run, tmp_path: Path) -> None:
    """As they stand in the help, with what the page says to append for a run of seconds."""
    written_on_the_page(tmp_path)
    program, *arguments = shlex.split(line)
    result = run(*arguments, *(in_small(name) if name else ()))
    assert program == "sdecontrol" and result.exit_code == 0, result.stderr
    assert result.stdout
    for option in ("--figure", "--output", "--samples", "--save", "--folder"):
        if option in arguments:
            assert (tmp_path / arguments[arguments.index(option) + 1]).exists(), option
    if "--json" in arguments:
        json.loads(result.stdout)


@pytest.mark.slow
def test_the_example_of_the_theory_checks_runs() -> None:
    from theory_checks.command import verify_command

    suite = typer.Typer()
    suite.command()(verify_command)
    told = CliRunner().invoke(suite, ["--help"], env={"COLUMNS": "80"}).stdout
    (arguments,) = re.findall(r"^ Example: python -m theory_checks (.*\S)", told, flags=re.MULTILINE)
    result = CliRunner().invoke(suite, shlex.split(arguments))
    assert result.exit_code == 0 and "theorem-2" in result.stdout, result.output
    assert max(map(len, told.splitlines())) <= 80


@pytest.mark.parametrize("name", sorted(BENCHMARKS.commands))
def test_examples_of_the_benchmarks_parse_and_fit_a_line(name: str) -> None:
    text = paragraphs(BENCHMARKS.commands[name].callback)  # type: ignore[arg-type]
    lines = re.findall(r"^Example: (.*)$", text, flags=re.MULTILINE)
    assert lines and not re.search(r"\[\w+\]", text)  # which a terminal would take for a style
    for line in lines:
        assert line.startswith(f"python -m benchmarks {name}") and len(line) <= 69
        assert parses(line, "python -m benchmarks", BENCHMARKS)


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
    for line in examples(name):
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


def test_notes_below_a_table_fit_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    note = " ".join(["seventeen letters"] * 20)
    for width, lines in ((80, 5), (None, 1)):  # a terminal; a file, whose lines are whole
        monkeypatch.setattr(common, "columns", lambda width=width: width)
        common.print_table("title", ("a", "b"), [("1", "2")], [note, "[3] is no style"])
        *told, last = capsys.readouterr().out.partition("seventeen")[2].splitlines()
        assert len(told) == lines and last == "[3] is no style"
        assert max(map(len, told)) <= (width or len(note))
        assert " ".join(line.strip() for line in ["seventeen" + told[0], *told[1:]]) == note
