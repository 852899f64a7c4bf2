"""``sdecontrol demo`` with tiny settings: table, figure, JSON, cache."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from sdecontrol.cli import demo_run
from sdecontrol.library.digits import DigitClassifier
from sdecontrol.methods import ratio_guidance

from .conftest import only_json


def always_three(images, labels, **options) -> DigitClassifier:
    """A classifier that says 3 whatever it sees, with probability ``e^2 / (e^2 + 9)``."""
    network = DigitClassifier()
    with torch.no_grad():
        network.body[-1].weight.zero_()
        network.body[-1].bias.copy_(2.0 * (torch.arange(10) == 3))
    return network


@pytest.mark.filterwarnings("ignore:Data has no positive values")  # the figure's axis of a KL that is 0
def test_demo_writes_figure_and_numbers(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a reward that is a constant all numbers are known: the tilt is the model itself."""
    monkeypatch.setattr(ratio_guidance, "STEPS", 20)
    monkeypatch.setattr(demo_run, "fit_digit_classifier", always_three)
    first = writes(run, tmp_path, "--iterations", "1")
    constant = 2 - math.log(math.exp(2) + 9)
    assert 0.07 < first["classifier_accuracy"] < 0.13  # threes among the digits
    for column in ("before", "guided", "one_network", "exact_tilt"):
        assert first[column]["share"]["value"] == 1
        assert first[column]["reward"]["value"] == pytest.approx(constant, abs=1e-5)
    assert first["before"]["log_z"]["value"] == pytest.approx(constant, abs=1e-5)
    assert first["before"]["kl"]["value"] == 0 and first["exact_tilt"]["ess"] == pytest.approx(1, abs=1e-5)


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
