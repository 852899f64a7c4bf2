"""Saved solutions and checkpoints: what is damaged or foreign is refused by name, and nothing is lost."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from cases import random_lq
from runs import quick, same

import sdecontrol as sc


@pytest.fixture(scope="module")
def problem():
    return random_lq(2, seed=1, dtype=torch.float32)


@pytest.mark.parametrize("start", ["dirac", "controlled"])
def test_a_saved_solution_loads_to_the_same_numbers(tmp_path, start):
    problem = random_lq(2, seed=1, dtype=torch.float32, start=start)
    solution = quick(problem)
    solution.save(tmp_path)
    again = sc.load(tmp_path, problem)
    assert same(solution, again)
    assert torch.equal(solution.sample(100, seed=1), again.sample(100, seed=1))
    assert str(solution.evaluate(256, seed=1)) == str(again.evaluate(256, seed=1))
    assert again.history == solution.history and again.method == solution.method and again.seed == solution.seed


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = bytearray()
    elif how == "bit-flipped":
        content[len(content) // 2] ^= 4
    elif how == "pickle":
        content = bytearray(pickle.dumps({"a": 1}))
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["truncated", "empty", "bit-flipped", "pickle"])
def test_damaged_tensors_are_refused(tmp_path, problem, how):
    quick(problem, iterations=1).save(tmp_path)
    damage(next(tmp_path.glob("*.safetensors")), how)
    with pytest.raises(sc.BadFileError, match="corrupt, truncated or foreign"):
        sc.load(tmp_path, problem)


@pytest.mark.parametrize("how", ["truncated", "empty", "pickle"])
def test_damaged_settings_are_refused(tmp_path, problem, how):
    quick(problem, iterations=1).save(tmp_path)
    damage(tmp_path / "solution.json", how)
    with pytest.raises(sc.BadFileError, match="corrupt or truncated"):
        sc.load(tmp_path, problem)


def test_foreign_files_are_refused(tmp_path, problem):
    (tmp_path / "solution.json").write_text(json.dumps({"hello": 1}))
    with pytest.raises(sc.BadFileError, match="not written by this package"):
        sc.load(tmp_path, problem)
    with pytest.raises(FileNotFoundError):
        sc.load(tmp_path / "nowhere", problem)
    (tmp_path / "solution.json").write_text(
        json.dumps({"format": "sdecontrol-1", "kind": "solution", "tensors": "../x"})
    )
    with pytest.raises(sc.BadFileError, match="names no tensor file"):
        sc.load(tmp_path, problem)


def test_a_solution_of_another_problem_is_refused_and_says_what_differs(tmp_path, problem):
    quick(problem, iterations=1).save(tmp_path)
    others = {
        "alpha": random_lq(2, seed=1, dtype=torch.float32, alpha=0.71),
        "drift": random_lq(2, seed=2, dtype=torch.float32),
        "reference": random_lq(3, seed=1, dtype=torch.float32),
        "running_cost": random_lq(2, seed=1, dtype=torch.float32, running=False),
    }
    for what, other in others.items():
        with pytest.raises(sc.BadFileError, match=f"another problem.*{what}"):
            sc.load(tmp_path, other)


def test_a_failed_write_leaves_the_previous_solution_intact(tmp_path, problem, monkeypatch):
    first = quick(problem, iterations=1)
    first.save(tmp_path)
    from sdecontrol.files import bundles as files

    real = files.os.replace

    def full_disk(source, target):
        if str(target).endswith(".json"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(files.os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        quick(problem, iterations=2).save(tmp_path)
    monkeypatch.undo()
    assert same(sc.load(tmp_path, problem), first)
    assert not list(tmp_path.glob(".*.part"))


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(tmp_path, problem):
    whole = quick(problem)
    quick(problem, iterations=12, checkpoint_dir=tmp_path, checkpoint_every=4)
    newest = sorted(tmp_path.glob("checkpoint-*.safetensors"))[-1]
    damage(newest, "bit-flipped")
    with pytest.warns(RuntimeWarning, match="passing over a damaged checkpoint"):
        assert same(quick(problem, checkpoint_dir=tmp_path, resume=True), whole)
    for path in tmp_path.glob("*.safetensors"):
        damage(path, "truncated")
    with pytest.warns(RuntimeWarning), pytest.raises(sc.BadFileError):
        quick(problem, checkpoint_dir=tmp_path, resume=True)


def test_a_checkpoint_of_another_run_is_refused(tmp_path, problem):
    quick(problem, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="already has checkpoints"):
        quick(problem, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="batch_size"):
        quick(problem, checkpoint_dir=tmp_path, resume=True, batch_size=128)
    with pytest.raises(sc.BadFileError, match="another problem"):
        quick(random_lq(2, seed=5, dtype=torch.float32), checkpoint_dir=tmp_path, resume=True)
    with pytest.raises(ValueError, match="needs checkpoint_dir"):
        quick(problem, resume=True)
