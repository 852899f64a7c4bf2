"""``sdecontrol compare``: the table, JSON, the figure, and what bad input says."""

from __future__ import annotations

from pathlib import Path

from .conftest import only_json

SMALL = ("--iterations", "2", "--time-steps", "5", "--batch-size", "64", "--paths", "128")


def test_json_and_figure(run) -> None:
    result = only_json(
        run(
            "compare",
            "ou-linear",
            "--methods",
            "adjoint-matching, best-of-n,classifier-guidance",
            *SMALL,
            "--figure",
            "f.png",
            "--json",
        )
    )
    assert result["problem"] == "ou-linear" and result["settings"]["time_steps"] == 5 and result["seeds"] == [0]
    assert [row["method"] for row in result["rows"]] == ["adjoint-matching", "best-of-n", "classifier-guidance"]
    assert result["rows"][0]["reward_calls"]["value"] == 128 and result["rows"][2]["reason"]
    assert result["frontier"] and result["exact"] == "of the chain"
    assert Path("f.png").read_bytes()[:4] == b"\x89PNG"


def test_table_seeds_and_the_default_methods(run) -> None:
    result = run("compare", "ou-linear", *SMALL, "--seeds", "2", "--seed", "3")
    assert result.exit_code == 0, result.stderr
    assert "adjoint-matching" in result.stdout and "over 2 seeds" in result.stdout
    assert "adjoint-matching, chosen by recommend: the reward has a gradient" in result.stdout


def test_problem_file_of_a_function(run) -> None:
    Path("my_compared_problem.py").write_text(
        "import torch\nimport sdecontrol as sc\n"
        "def make():\n"
        "    sde = sc.SDE(lambda x, t: -x, diffusion=1.0, dim=2)\n"
        "    return sc.ControlProblem(sde, sc.Dirac(torch.zeros(2)), reward=lambda x: -(x - 1).square().sum(-1))\n"
    )
    Path("p.toml").write_text(
        '[problem]\nfunction = "my_compared_problem:make"\n[solve]\niterations = 1\ntime_steps = 5\n'
    )
    result = only_json(run("compare", "p.toml", "--methods", "log-variance", "--paths", "64", "--json"))
    assert result["settings"]["iterations"] == 1 and result["rows"][0]["reason"] is None


def test_bad_input(run) -> None:
    for arguments, what in (
        (("ou-linaer",), "ou-linear"),
        (("ou-linear", "--methods", "soft-pop"), "soft-ppo"),
        (("ou-linear", "--methods", ","), "methods is empty"),
    ):
        result = run("compare", *arguments, "--paths", "64", "--time-steps", "5")
        assert result.exit_code == 2 and what in result.stderr
    assert "Example" in run("compare", "--help").stdout
