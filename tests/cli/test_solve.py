"""``sdecontrol solve``: named problems, TOML files, and what bad input says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import sdecontrol as sc

from .conftest import only_json

GOOD = """
alpha = 0.5
[sde]
A = [[-1.0, 0.5], [0.0, -1.0]]
sigma = 1.0
horizon = 1.0
[initial]
point = [0.0, 0.0]
[reward]
G = [[1.0, 0.0], [0.0, 1.0]]
g = [1.0, 1.0]
[running_cost]
F = [[0.1, 0.0], [0.0, 0.1]]
[solve]
time_steps = 10
iterations = 3
batch_size = 32
"""

MODULE = """
import torch
import sdecontrol as sc

def make():
    sde = sc.SDE(lambda x, t: -x, diffusion=1.0, dim=2, horizon=1.0)
    return sc.ControlProblem(sde, sc.Dirac(torch.zeros(2)), reward=lambda x: -(x - 1).square().sum(-1))

number = 3
"""


def test_named_problem_beside_the_exact_solution(run) -> None:
    result = only_json(run("solve", "ou-quadratic-easy", "--iterations", "3", "--paths", "256", "--json"))
    assert result["problem"] == "ou-quadratic-easy" and result["settings"]["time_steps"] == 50
    assert result["exact"]["discretised"]["elbo"] == pytest.approx(-5.7731, abs=1e-3)
    assert result["exact"]["continuous"]["elbo"] == pytest.approx(-5.8182, abs=1e-3)
    assert result["evaluation"]["exact"] and result["evaluation"]["gap"]["value"] > 0
    assert result["exact"]["discretised"]["control_error"]["value"] > 0


def test_seed_decides(run) -> None:
    arguments = ("solve", "ou-linear", "--iterations", "2", "--time-steps", "5", "--paths", "64", "--json", "--seed")
    first, again, other = (only_json(run(*arguments, seed))["evaluation"] for seed in ("4", "4", "5"))
    assert first == again and first != other


def test_table_and_problem_without_exact_solution(run) -> None:
    result = run("solve", "unicycle", "--iterations", "1", "--time-steps", "20", "--paths", "64")
    assert result.exit_code == 0
    assert "log Z" in result.stdout and "not known" in result.stdout


def test_toml_file_and_save(run, tmp_path: Path) -> None:
    Path("problem.toml").write_text(GOOD)
    result = only_json(run("solve", "problem.toml", "--save", "kept", "--json"))
    assert result["settings"] == {
        "method": "adjoint-matching",
        "seed": 0,
        "time_steps": 10,
        "iterations": 3,
        "batch_size": 32,
    }
    assert set(result["exact"]) == {"discretised", "continuous"}
    from sdecontrol.cli.problem_file import read_problem_file

    problem, _ = read_problem_file(Path("problem.toml"))
    assert problem.alpha == 0.5
    solution = sc.load("kept", problem)
    assert solution.iterations == 3
    exact = sc.exact_solution(problem, time_steps=10)
    assert float(exact.log_z) == pytest.approx(result["exact"]["discretised"]["log_z"])


def test_toml_file_of_a_function(run) -> None:
    Path("my_own_problem.py").write_text(MODULE)
    Path("p.toml").write_text('[problem]\nfunction = "my_own_problem:make"\n[solve]\niterations = 1\ntime_steps = 5\n')
    result = only_json(run("solve", "p.toml", "--paths", "64", "--json"))
    assert math.isfinite(result["evaluation"]["elbo"]["value"])
    assert result["exact"]["discretised"]["log_z"] >= result["exact"]["discretised"]["elbo"]  # known from a grid


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("alpha = ", ["p.toml", "not valid TOML"]),
        (GOOD.replace("alpha", "alpa"), ["p.toml", "'alpa'", "'alpha'"]),
        (GOOD.replace("horizon = 1.0", "horison = 1.0"), ["[sde]", "'horison'", "'horizon'"]),
        (GOOD.replace("[0.0, -1.0]]", "[0.0, -1.0, 2.0]]"), ["p.toml", "[sde] A", "d x d matrix"]),
        (GOOD.replace("sigma = 1.0", ""), ["[sde] sigma is missing"]),
        (GOOD.replace("sigma = 1.0", "sigma = 0.0"), ["[sde]", "sigma is 0"]),
        (GOOD.replace("horizon = 1.0", "horizon = -1.0"), ["[sde]", "horizon must be > 0"]),
        (GOOD.replace("point = [0.0, 0.0]", "point = [0.0]"), ["[initial]", "point", "2 x 2"]),
        (GOOD.replace("point = [0.0, 0.0]", ""), ["[initial] mean is missing"]),
        (GOOD.replace("g = [1.0, 1.0]", 'g = "one"'), ["[reward]", "g must be"]),
        (GOOD.replace("alpha = 0.5", "alpha = -1"), ["p.toml", "alpha must be > 0"]),
        (GOOD.replace("iterations = 3", "iterations = 3.5"), ["[solve] iterations", "int"]),
        (GOOD.replace("[solve]", "[solve]\nmethod = 'reward-backpropp'"), ["reward-backprop"]),
        ('[problem]\nfunction = "no_such_module:make"', ["p.toml", "no_such_module"]),
        ('[problem]\nfunction = "my_own_problem:mak"', ["'mak'", "'make'"]),
        ('[problem]\nfunction = "my_own_problem:number"', ["not a ControlProblem"]),
    ],
)
def test_bad_toml_says_where_and_what(run, text: str, parts: list[str]) -> None:
    Path("my_own_problem.py").write_text(MODULE)
    Path("p.toml").write_text(text)
    result = run("solve", "p.toml")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.output
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (("ou-quadratic-hart",), 2, "'ou-quadratic-hard'"),
        (("missing.toml",), 2, "missing.toml"),
        (("ou-linear", "--method", "reward-backprob"), 2, "'reward-backprop'"),
        (("ou-linear", "--learning-rate", "1e30", "--iterations", "20", "--time-steps", "5"), 1, "not finite"),
    ],
)
def test_errors_are_one_line(run, arguments: tuple[str, ...], code: int, part: str) -> None:
    result = run("solve", *arguments)
    assert result.exit_code == code
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and part in errors[0] and "Traceback" not in result.output


def test_debug_shows_the_traceback(run) -> None:
    assert "Traceback" in run("solve", "ou-linnear", "--debug").stderr


@pytest.mark.parametrize("command", ["solve", "demo"])
def test_help_has_an_example(run, command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0 and f"Example: sdecontrol {command}" in result.stdout


def test_figure(run, tmp_path: Path) -> None:
    arguments = ("solve", "ou-linear", "--iterations", "2", "--time-steps", "5", "--paths", "64", "--json")
    path = tmp_path / "solution.png"
    assert only_json(run(*arguments, "--figure", str(path)))["figure"] == str(path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    result = run(*arguments, "--figure", str(tmp_path / "solution.txt"))
    assert result.exit_code != 0 and "--figure" in result.stderr
