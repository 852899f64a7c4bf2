"""What a command does when nothing is said is what its function does."""

from __future__ import annotations

import inspect

import pytest

import sdecontrol as sc
from sdecontrol.cli.compare import compare
from sdecontrol.cli.sample import sample
from sdecontrol.cli.solve import solve
from sdecontrol.cli.verify import verify
from sdecontrol.evaluation.solution import Solution
from theory_checks import Setting
from theory_checks.command import verify_command


def defaults(function) -> dict:
    found = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in found if p.default is not inspect.Parameter.empty}


@pytest.mark.parametrize(
    ("command", "function", "names", "apart"),
    [
        (verify, verify_command, {}, set()),
        (verify, Setting, {}, set()),
        (compare, sc.compare, {"paths": "n"}, {"batch_size"}),  # None: the named problem's card says it
        (solve, sc.solve, {}, {"batch_size"}),
        (solve, Solution.evaluate, {"paths": "n"}, set()),
        (sample, Solution.evaluate, {}, {"seed"}),  # 0: two runs of a command give the same numbers
        (sample, sc.gibbs_problem, {}, set()),
    ],
)
def test_commands_have_the_defaults_of_what_they_call(command, function, names, apart) -> None:
    own, theirs = {names.get(name, name): value for name, value in defaults(command).items()}, defaults(function)
    shared = (own.keys() & theirs.keys()) - apart
    assert shared and {name: own[name] for name in shared} == {name: theirs[name] for name in shared}
