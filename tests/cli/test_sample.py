"""``sdecontrol sample``: named targets, functions of one's own, files, the figure, and what bad input says."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import sdecontrol as sc
from sdecontrol.evaluation.estimates import Estimate
from sdecontrol.evaluation.sample_figure import sample_figure, telling_coordinates

from .conftest import only_json

QUICK = ("--method", "log-variance", "--iterations", "1", "--time-steps", "5", "--n", "128")
SMC = ("--method", "tempered-smc", "--n", "256")
MODULE = """
import numpy as np
import torch
import sdecontrol as sc
from sdecontrol.library.target_base import Target

def log_density(x):                                    # N((1, 1), I), normalised, times e^2
    return 2 - 0.5 * (x - 1).square().sum(1) - torch.tensor(2 * torch.pi).log()

def box(x):                                            # of numpy's arrays: uniform on 2 numbers above 0 with sum < 1
    return np.where(x.sum(1) < 1, np.log(2.0), -np.inf)

def point(x): return -0.5 * float(np.sum((np.asarray(x) - 1) ** 2))
prior = {"a": torch.distributions.Normal(0.0, 1.0)}
made = sc.gibbs_problem(log_likelihood=lambda v: -0.5 * (v["a"] - 1) ** 2, prior=prior)

def column(x): return -x.square().sum(1, keepdim=True)
def improper(x): return x[:, 0]
def broken(x): return x @ torch.ones(7)
def undefined(x): return torch.where(x[:, 0] > 1, torch.nan, -x.square().sum(1))
number = 3

class Own(Target):
    name, version, dim, log_z = "own", 1, 3, 4.0
    def __call__(self, x): return 4 - 0.5 * x.square().sum(1) - 1.5 * torch.tensor(2 * torch.pi).log()

own = Own()
"""


@pytest.fixture(autouse=True)
def module(run) -> None:
    Path("my_sampled_module.py").write_text(MODULE)


def test_named_target_beside_what_is_known(run) -> None:
    result = only_json(run("sample", "many-well-5", *QUICK, "--no-certificate", "--json", "--seed", "3"))
    assert result["target"] == "many-well-5" and result["version"] == 1 and result["dim"] == 5
    assert result["exact_log_z"] == pytest.approx(-0.541056, abs=1e-5)
    found, off = result["evaluation"]["log_z"], result["deviation"]
    assert off["nats"] == pytest.approx(found["value"] + 0.541056, abs=1e-5)
    assert off["standard_errors"] == pytest.approx(off["nats"] / found["stderr"])
    distances = result["distances"]
    assert distances["reference"] == "exact sampler" and distances["modes"]["of"] == 32
    assert distances["left_share"]["true"] == pytest.approx(0.5)
    for name in ("sliced_wasserstein", "energy_wasserstein"):
        assert distances[name]["value"] > distances[name]["floor"] > 0  # little was learnt in one iteration
    assert result["certificate"] is None and 0 < distances["modes"]["hit"] <= 32
    assert 0 < result["evaluations"] < result["with_evaluation"]["evaluations"]


def test_evaluations_are_those_of_the_log_density(run, monkeypatch) -> None:
    """Counted again, by the function itself."""
    import sys

    rows, before = [], list(sys.path)
    first = only_json(run("sample", "my_sampled_module:log_density", "--dim", "2", *QUICK, "--json"))
    assert sys.path == before  # nothing of the folder stays on the path
    module = sys.modules["my_sampled_module"]
    own = module.log_density

    def counted(x):
        rows.append(len(x) * (1 + bool(getattr(x, "requires_grad", False))))  # a gradient is one more
        return own(x)

    monkeypatch.setattr(module, "log_density", counted)
    second = only_json(run("sample", "my_sampled_module:log_density", "--dim", "2", *QUICK, "--json"))
    assert sum(rows) == second["with_evaluation"]["evaluations"] == first["with_evaluation"]["evaluations"]


@pytest.mark.slow
def test_particles_reach_the_floor_of_exact_samples(run) -> None:
    result = only_json(run("sample", "gmm9", *SMC, "--json"))
    assert abs(result["deviation"]["standard_errors"]) < 5 and result["distances"]["modes"]["hit"] == 9
    for name in ("sliced_wasserstein", "energy_wasserstein"):
        assert result["distances"][name]["value"] < 4 * result["distances"][name]["floor"]
    assert result["certificate"] is None and result["iterations"] == 0 and result["report"] is None


@pytest.mark.slow
def test_auto_on_a_function_of_ones_own_with_all_its_files(run) -> None:
    result = only_json(
        run(
            *("sample", "my_sampled_module:log_density", "--dim", "2", "--iterations", "1", "--n", "256"),
            *("--figure", "f.png", "--samples", "s.npy", "--save", "kept", "--json"),
        )
    )
    assert result["settings"]["method"] == "auto" and result["iterations"] == 1 and result["version"] is None
    assert result["report"].startswith("round 1, from a wide Gaussian") and "kept: " in result["report"]
    assert result["exact_log_z"] is None and result["distances"] is None
    assert abs(result["evaluation"]["log_z"]["value"] - 2) < 5 * result["evaluation"]["log_z"]["stderr"] + 1e-3
    assert Path("f.png").read_bytes()[:4] == b"\x89PNG"
    x, log_w = np.load("s.npy"), np.load("s-log-weights.npy")
    assert x.shape == (256, 2) and log_w.shape == (256,)
    assert np.log(np.exp(log_w).mean()) == pytest.approx(2, abs=0.1)  # weights estimate Z
    assert np.abs(np.average(x, axis=0, weights=np.exp(log_w)) - 1).max() < 0.4
    import my_sampled_module  # pyright: ignore[reportMissingImports]

    problem = sc.gibbs_problem(my_sampled_module.log_density, 2, seed=0)
    assert sc.load("kept", problem).details["report"] == result["report"]


@pytest.mark.slow
def test_numpy_names_and_bounds_from_the_command_line(run) -> None:
    """Samples are in the function's own parameters, and Z is of these: the triangle has Z = 1 and means 1/3."""
    how = ("--names", "left,right", "--support", "0:1", *SMC, "--samples", "s.npy", "--figure", "f.png")
    result = only_json(run("sample", "my_sampled_module:box", *how, "--json"))
    found = result["evaluation"]["log_z"]
    assert abs(found["value"]) < 5 * found["stderr"] + 0.02, found
    x, w = np.load("s.npy"), np.exp(np.load("s-log-weights.npy"))
    assert x.min() > 0 and x.sum(1)[w > 0].max() < 1
    assert list(result["parameters"]) == ["left", "right"]
    for row in result["parameters"].values():
        assert abs(row["mean"] - 1 / 3) < 0.06 and abs(row["sd"] - 18**-0.5) < 0.05 and row["5%"] < row["50%"]
    assert Path("f.png").read_bytes()[:4] == b"\x89PNG"
    assert "right" in run("sample", "my_sampled_module:box", *how).output


@pytest.mark.slow
def test_one_point_and_a_whole_problem_from_the_command_line(run) -> None:
    found = only_json(run("sample", "my_sampled_module:point", "--dim", "1", "--one-point", *SMC, "--json"))
    assert abs(found["evaluation"]["log_z"]["value"] - 0.919) < 0.1
    whole = only_json(run("sample", "my_sampled_module:made", *SMC, "--json"))
    assert list(whole["parameters"]) == ["a"] and abs(whole["parameters"]["a"]["mean"] - 0.5) < 0.2
    assert abs(whole["evaluation"]["log_z"]["value"] + 0.25 + 0.5 * math.log(2)) < 0.1


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_samples_in_other_files(run, suffix: str) -> None:
    only_json(run("sample", "gmm9", *QUICK, "--no-certificate", "--samples", f"deep/s{suffix}", "--json"))
    path = Path("deep") / f"s{suffix}"
    if suffix == ".pt":
        saved = torch.load(path, weights_only=True)
    else:
        from safetensors.torch import load_file

        saved = load_file(path)
    assert saved["samples"].shape == (128, 2) and saved["log_weights"].shape == (128,)


@pytest.mark.slow
def test_trained_method_with_a_certificate(run) -> None:
    result = run(
        *("sample", "gmm9", "--method", "particle-matching", "--iterations", "2", "--time-steps", "10"),
        *("--n", "128", "--reference", "brownian", "--scale", "6.5", "--figure", "f.png"),
    )
    assert result.exit_code == 0, result.stderr
    for part in (
        "exact log Z   0; found",
        "EUBO",
        "from exact samples",
        "sliced W1",
        "of 9",
        "evaluations of the log density",
    ):
        assert part in result.stdout
    assert "certificate of the sampler's paths" in result.stdout


def test_seed_decides(run) -> None:
    def numbers(seed: str) -> dict:
        found = only_json(run("sample", "gmm9", *QUICK, "--json", "--seed", seed))
        return {key: found[key] for key in ("evaluation", "distances", "evaluations")}

    assert numbers("4") == numbers("4") != numbers("5")


def test_a_target_of_ones_own_knows_its_dimension(run) -> None:
    result = run("sample", "my_sampled_module:own", *QUICK)
    assert result.exit_code == 0, result.stderr
    assert "own, d = 3" in result.stdout and "exact log Z   4; found" in result.stdout
    assert "--reference-samples compares" in result.stdout


def test_long_runs_stand_for_exact_samples_when_asked(run, monkeypatch) -> None:
    from sdecontrol.library import samples as module

    short = module.reference_samples
    monkeypatch.setattr(
        module, "reference_samples", lambda target, *a: short(target, 200, systems=4, particles=64, moves=1)
    )
    result = run("sample", "my_sampled_module:own", *QUICK, "--reference-samples", "--figure", "f.png")
    assert result.exit_code == 0, result.stderr
    assert (
        "log Z by 4 systems of tempered particles" in result.stdout and "the halves of the long runs" in result.stdout
    )
    result = run("sample", "my_sampled_module:log_density", "--dim", "2", *QUICK, "--reference-samples")
    assert result.exit_code == 2 and "--reference-samples" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (("gmm-9",), 2, "did you mean 'gmm9'"),
        (("gmm9", "--dim", "3"), 2, "has dimension 2, not 3"),
        (("my_sampled_module:log_density",), 2, "--dim is missing"),
        (("my_sampled_module:log_densty", "--dim", "2"), 2, "'log_density'"),
        (("no_such_module:f", "--dim", "2"), 2, "cannot import 'no_such_module'"),
        (("my_sampled_module:number", "--dim", "2"), 2, "not a log density"),
        (("my_sampled_module:column", "--dim", "2"), 2, ".squeeze(-1)"),
        (("my_sampled_module:broken", "--dim", "2"), 1, "log_density failed"),
        (("my_sampled_module:improper", "--dim", "2"), 2, "log_density"),
        (("my_sampled_module:undefined", "--dim", "2"), 1, "NaN"),
        (("gmm9", "--method", "autoo"), 2, "'auto'"),
        (("gmm9", "--method", "tempered-smc", "--budget", "5s"), 2, "trains nothing"),
        (("gmm9", "--budget", "soon"), 2, "budget must be"),
        (("gmm9", "--reference", "uo"), 2, "'ou'"),
        (("gmm9", "--scale", "-1"), 2, "scale must be > 0"),
        (("gmm9", "--figure", "f.txt"), 2, "--figure must be"),
        (("gmm9", "--samples", "s.csv"), 2, "--samples must be"),
        (("gmm9", *SMC, "--certificate"), 2, "no control"),
    ],
)
def test_errors_are_one_line(run, arguments: tuple[str, ...], code: int, part: str) -> None:
    result = run("sample", *arguments)
    assert result.exit_code == code, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and part in errors[0] and "Traceback" not in result.output


def test_help_names_all_targets_and_has_examples(run) -> None:
    text = run("sample", "--help").stdout
    assert "Example: sdecontrol sample" in text
    for name in sc.library.target_names():
        assert name in text


# ---------------------------------------------------------------- the first mixture of auto, and the bar


def test_auto_learns_from_its_search_and_its_particles() -> None:
    """The second round begins with a mixture of what the first found: nearly no tempering is left on nine Gaussians."""
    problem = sc.gibbs_problem(sc.library.named_target("gmm9"), 2, seed=0)
    solution = sc.solve(problem, sc.Auto(512), iterations=2, seed=0)
    assert abs(solution.history[1]["log_z"]) < 0.05 and solution.history[1]["levels"] <= 2
    assert solution.history[1]["cost"] < 0.2 * solution.history[0]["cost"]


def test_the_bar_shows_the_last_round_and_no_total_under_a_budget(capsys, monkeypatch) -> None:
    from sdecontrol.training import progress

    monkeypatch.setattr(progress, "PLAIN_EVERY", 0.0)
    problem = sc.gibbs_problem(sc.library.named_target("gmm9"), 2, seed=0)
    solution = sc.solve(problem, sc.Auto(256), budget="1h", seed=0, progress=True)  # not reached, on any machine
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == solution.iterations > 1
    for k, (line, row) in enumerate(zip(lines, solution.history), 1):
        assert line.startswith(f"auto {k}, log_z {Estimate(row['log_z'], row['log_z_stderr'])}, ")


@pytest.mark.filterwarnings("ignore:.*effective of:RuntimeWarning")
@pytest.mark.parametrize("budget", [0.02, 0.15, 0.25])
def test_a_budget_that_ends_anywhere_gives_a_solution(budget: float) -> None:
    """In the search, before the first round has enough particles for a law, after a few systems of the estimate."""
    problem = sc.gibbs_problem(sc.library.named_target("gmm9"), 2, seed=0)
    solution = sc.solve(problem, sc.Auto(256), budget=budget, seed=0, progress=False)
    assert solution.sample(4, seed=1).shape == (4, 2)


# ---------------------------------------------------------------- the figure


def test_telling_coordinates() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 8, generator=g, dtype=torch.float64)
    x[:, 2] += 4 * torch.randint(0, 2, (2000,), generator=g)
    x[:, 5] = x[:, 5] ** 3
    pair, why = telling_coordinates(x)
    assert pair == (2, 5) and "least Gaussian" in why
    x[:, 7] = x[:, 1] ** 2 + 0.1 * x[:, 7]  # uncorrelated, and dependent
    pair, why = telling_coordinates(x)
    assert pair == (1, 7) and "most dependent" in why
    x[:, 3], x[:, 4] = x[:, 3].sign() * x[:, 3].abs().exp() ** 4, x[:, 4].sign() * x[:, 4].abs().exp() ** 4
    assert telling_coordinates(x)[0] == (1, 7)  # tails are no dependence
    x = sc.library.named_target("funnel").sample(2000, 1).double()
    assert telling_coordinates(x)[0][0] == 0  # the neck's coordinate, which all others depend on
    assert telling_coordinates(x[:, :2])[0] == (0, 1) and telling_coordinates(x[:, :1])[0] == (0, 0)


def test_the_figure_shows_what_it_is_given() -> None:
    problem = sc.gibbs_problem(sc.library.named_target("gmm9"), 2, seed=0)
    solution = sc.solve(problem, "tempered-smc", seed=0, time_steps=5)
    solution.history = [{"levels": 2.0, "log_z": z, "objective_stderr": 0.1} for z in (-9.0, -0.3, -0.1, 0.02)]
    x = sc.library.named_target("gmm9").sample(500, 1)
    figure, (plane, margins, bounds) = sample_figure(
        solution, x, exact=x + 1, log_z=0.0, evaluation=solution.evaluate(256, seed=1), title="gmm9"
    )
    (dots,) = (line for line in plane.get_lines() if line.get_label() == "samples")
    assert np.allclose(np.stack(dots.get_data(), 1), x.numpy())
    assert [axes.get_ylabel() for axes in margins] == ["x1", "x2"]
    assert any(
        line.get_label() == "exact log Z = 0" and list(line.get_ydata()) == [0, 0] for line in bounds.get_lines()
    )
    low, high = bounds.get_ylim()
    assert low > -3 and any(text.get_text().startswith("-9") for text in bounds.texts)  # far off, and said so
    for axes in margins:  # each is a density over its range
        (filled,) = (p for p in axes.patches if p.get_label() == "samples")
        values, edges, _ = filled.get_data()
        assert 0.95 < float((values * np.diff(edges)).sum()) <= 1 + 1e-9
    assert figure.get_suptitle() == "gmm9" and math.isfinite(high)
