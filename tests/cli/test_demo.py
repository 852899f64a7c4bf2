"""``sdecontrol demo`` with tiny settings: table, figure, JSON, cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdecontrol.methods import ratio_guidance

from .conftest import only_json


def test_demo_writes_figure_and_numbers(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ratio_guidance, "STEPS", 20)
    writes(run, tmp_path, "--iterations", "1")


def writes(run, tmp_path: Path, *options: str) -> dict:
    first = only_json(run("demo", "--quick", "--json", "--output", "out/demo.png", *options))
    assert (tmp_path / "out/demo.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "out/demo.json").read_text()) == first
    assert not first["models_cached"] and first["label"] == 3
    for column in ("before", "guided", "one_network", "exact_tilt"):
        assert {"reward", "kl", "log_z", "ess", "share", "sliced_wasserstein"} <= first[column].keys()
    return first


@pytest.mark.slow
def test_demo_writes_figure_and_numbers_and_uses_its_cache(run, tmp_path: Path) -> None:
    first = writes(run, tmp_path)
    again = run("demo", "--quick", "--output", "out/demo.png")
    assert again.exit_code == 0 and "from the cache" in again.stdout and "sliced W1" in again.stdout
    second = json.loads((tmp_path / "out/demo.json").read_text())
    assert second["models_cached"] and second["one_network"]["kl"] == first["one_network"]["kl"]  # the same models


@pytest.mark.slow
def test_a_damaged_cache_is_reported_and_made_again(run, tmp_path: Path) -> None:
    assert run("demo", "--quick", "--iterations", "1").exit_code == 0
    (tensors,) = (tmp_path / "cache").glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:1000])
    result = run("demo", "--quick", "--iterations", "1")
    assert result.exit_code == 0 and "cache is damaged" in result.stderr
    assert "from the cache" in run("demo", "--quick", "--iterations", "1").stdout


def test_bad_options(run) -> None:
    assert run("demo", "--label", "11").exit_code == 2
    result = run("demo", "--quick", "--output", "demo.txt")
    assert result.exit_code == 2 and "--output" in result.stderr
