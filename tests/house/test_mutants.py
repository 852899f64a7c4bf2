"""The mutants of ``python -m benchmarks mutants``: which changes there are, and which are drawn."""

from pathlib import Path

import pytest

from benchmarks.mutants.draw import draw, shares
from benchmarks.mutants.operators import KINDS, changes, is_program
from benchmarks.mutants.share import statements
from benchmarks.mutants.traces import as_it_was

PACKAGE = Path(__file__).parents[2] / "sdecontrol"
SOURCE = b'''"""A docstring of 2 + 2."""
import torch

LIMIT: int = 3


def mean(x, power=2, keep=False):
    """Not 1 - 1."""
    if not x.any() and power > 1:
        raise ValueError(f"at most {power - 1}, not {3 * power}")
    total = -x.sum(0, keepdim=keep) + 0.5 * x.detach()
    total *= 4
    x.zero_()
    warn(f"{power + 1} " * 2)
    return torch.cat((total, x), dim=1) if power in (1, 2) else total


class Table:
    rows: int = 10

    def __repr__(self):
        return "-" * 70
'''


def changed(kind: str) -> set[tuple[str, str]]:
    """What is replaced, and by what, of one kind."""
    return {(SOURCE[c.start : c.end].decode(), c.text) for c in changes(SOURCE) if c.kind == kind}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("operator", {("+", "-"), ("*", "/"), ("*=", "/=")}),
        ("comparison", {(">", ">="), (">", "<"), ("in", "not in")}),
        ("constant", {("3", "4"), ("2", "3"), ("False", "True"), ("1", "2"), ("0.5", "1.0"), ("4", "5"), ("10", "11")}),
        ("axis", {("0", "-1"), ("1", "0")}),
        ("function", {("sum", "mean"), ("any", "all"), ("x.detach()", "x")}),
        ("statement", {("total *= 4", "pass"), ("x.zero_()", "pass")}),
        (
            "sign",
            {
                ("-x.sum(0, keepdim=keep)", "(x.sum(0, keepdim=keep))"),
                ("0.5 * x.detach()", "(-(0.5 * x.detach()))"),
            },
        ),
        (
            "term",
            {
                ("-x.sum(0, keepdim=keep) + 0.5 * x.detach()", "(-x.sum(0, keepdim=keep))"),
                ("-x.sum(0, keepdim=keep) + 0.5 * x.detach()", "(0.5 * x.detach())"),
                ("0.5 * x.detach()", "(0.5)"),
                ("0.5 * x.detach()", "(x.detach())"),
            },
        ),
        (
            "condition",
            {
                ("not x.any() and power > 1", "(not (not x.any() and power > 1))"),
                ("not x.any() and power > 1", "((not x.any()) or (power > 1))"),
                ("not x.any()", "bool(x.any())"),
                ("power in (1, 2)", "(not (power in (1, 2)))"),
            },
        ),
    ],
)
def test_changes_of_each_kind_and_none_of_what_is_only_read(kind, expected):
    assert changed(kind) == expected


def test_changes_are_programs_and_know_where_they_are():
    found = changes(SOURCE)
    assert {c.kind for c in found} == set(KINDS) and all(is_program(c, SOURCE) for c in found)
    lines = SOURCE.decode().splitlines()
    for change in found:
        assert SOURCE[change.start : change.end].decode().split("\n")[0] in lines[change.line - 1]
        assert change.first <= change.line <= change.last
    assert {(c.scope, c.function) for c in found} == {
        ("module", ""),
        ("default", "mean"),
        ("body", "mean"),
        ("class", "Table"),
    }


@pytest.mark.slow
def test_every_room_has_its_share():
    number = 100
    wanted = shares(PACKAGE, number)
    drawn = draw(PACKAGE, number, seed=0)
    assert len(drawn) == sum(wanted.values()) == number and min(wanted.values()) == 3
    assert {r: sum(m.room == r for m in drawn) for r in wanted} == wanted
    assert len({(m.file, m.change.line) for m in drawn}) == len({m.name for m in drawn}) == number
    assert {m.change.kind for m in drawn} == set(KINDS)


def test_a_seed_draws_the_same_again(tmp_path):
    (tmp_path / "room").mkdir()
    for name in ("room/__init__.py", "room/tables.py", "room/figure.py", "errors.py"):
        (tmp_path / name).write_bytes(SOURCE)
    drawn = draw(tmp_path, 6, seed=0)
    assert drawn == draw(tmp_path, 6, seed=0) != draw(tmp_path, 6, seed=1)
    assert {m.file.split("/", 1)[1] for m in drawn} == {"room/tables.py", "errors.py"}


def test_statements_are_those_of_functions_by_their_heads():
    source = '''LIMIT = 3


def f(x):
    """Text."""
    if x:
        y = (
            1
        )
    for i in x:
        pass
    return y
'''
    assert statements(source) == [(6, 6), (7, 9), (10, 10), (12, 12)]


def test_what_a_killed_run_left_planted_is_taken_back(tmp_path):
    name = "sdecontrol/tensors.py"
    left = tmp_path / name
    left.parent.mkdir()
    left.write_text("raise SystemExit\n")
    if not (PACKAGE.parent / ".git").exists():
        pytest.skip("not in a repository")
    committed = as_it_was(tmp_path, "HEAD", name)
    assert left.read_bytes() == committed and b"def " in committed
