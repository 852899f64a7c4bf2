"""The names of GFlowNets for path consistency, and the moment loss that is one of them."""

import json
from pathlib import Path

import pytest
import torch
from cases import random_lq

import sdecontrol as sc
from sdecontrol.files import migrations
from sdecontrol.files.bundles import read_bundle, write_bundle
from sdecontrol.methods.base import find_method, method_names

NAMES = {
    "trajectory-balance": sc.PathConsistency(n="all"),
    "sub-trajectory-balance": sc.PathConsistency(n=10),
    "detailed-balance": sc.PathConsistency(n=1),
}
RUN = {"time_steps": 4, "batch_size": 64, "seed": 0, "progress": False}


@pytest.mark.parametrize("name", NAMES)
def test_the_names_of_gflownets_are_settings_of_path_consistency(name):
    assert find_method(name) == NAMES[name] and name not in method_names() and name in sc.PathConsistency.__doc__
    problem = random_lq(2, seed=1)
    ours, same = (sc.solve(problem, m, iterations=2, **RUN) for m in (name, NAMES[name]))
    assert ours.method == "path-consistency" and torch.equal(ours.sample(64, seed=1), same.sample(64, seed=1))


def test_a_name_that_is_nearly_one_of_them_is_told():
    with pytest.raises(ValueError, match="did you mean 'trajectory-balance'"):
        find_method("trajectory-balence")


def test_the_moment_loss_names_its_successor():
    for make in (lambda: sc.LogVariance("moment"), lambda: sc.LogVariance(loss="moment")):
        with pytest.raises(ValueError, match=r"PathConsistency\(n='all'\), by name 'trajectory-balance'"):
            make()
    assert sc.LogVariance("variance") == sc.LogVariance(loss="variance") == sc.LogVariance()


def aged(path: Path, change) -> None:
    """The bundle as an older version of the package wrote it."""
    tensors, settings = read_bundle(path.parent, path.stem, path.stem.split("-")[0])
    change(settings)
    write_bundle(path.parent, path.stem, tensors, {**settings, "schema": 3})
    assert json.loads(path.read_text())["schema"] == 3


def moment(settings) -> None:
    assert settings["method" if settings["kind"] == "solution" else "identity"]
    if settings["kind"] == "solution":
        settings["method"] = "log-variance"
    else:
        own = {"loss": "moment", "paths": "current", "steps": None, "group_size": None}
        settings["identity"] |= {"method": "log-variance", "method_settings": own}


def variance(settings) -> None:
    settings["identity"]["method_settings"]["loss"] = "variance"


def test_files_of_the_moment_loss_are_those_of_its_successor(tmp_path):
    assert migrations.SCHEMA >= 4
    problem = random_lq(2, seed=1)
    kept = {"checkpoint_dir": tmp_path / "run", "checkpoint_every": 2, **RUN}
    solution = sc.solve(problem, "trajectory-balance", iterations=2, **kept)
    solution.save(tmp_path / "done")
    aged(tmp_path / "done" / "solution.json", moment)
    again = sc.load(tmp_path / "done", problem)
    assert again.method == "path-consistency" and torch.equal(again.sample(64, seed=1), solution.sample(64, seed=1))
    for path in (tmp_path / "run").glob("checkpoint-*.json"):
        aged(path, moment)
    resumed = sc.solve(problem, "trajectory-balance", iterations=2, resume=True, **kept)
    assert torch.equal(resumed.sample(64, seed=1), solution.sample(64, seed=1))


def test_checkpoints_of_the_variance_loss_are_resumed(tmp_path):
    problem = random_lq(2, seed=1)
    kept = {"checkpoint_dir": tmp_path, "checkpoint_every": 2, **RUN}
    solution = sc.solve(problem, "log-variance", iterations=2, **kept)
    for path in tmp_path.glob("checkpoint-*.json"):
        aged(path, variance)
    resumed = sc.solve(problem, "log-variance", iterations=2, resume=True, **kept)
    assert torch.equal(resumed.sample(64, seed=1), solution.sample(64, seed=1))
