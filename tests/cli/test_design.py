"""``sdecontrol design``: rounds, JSON, the figure, a folder that goes on, and what bad input says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdecontrol.cli.design import judged
from sdecontrol.comparison.design import Design
from sdecontrol.library.logos import information
from sdecontrol.library.sequences import sequence_task

from .conftest import only_json

SMALL = ("--batch", "16", "--iterations", "2", "--batch-size", "64", "--fit-iterations", "5", "--designs", "64")


def test_json_figure_and_a_folder_that_goes_on(run) -> None:
    begun = only_json(run("design", *SMALL, "--rounds", "1", "--folder", "kept", "--json"))
    result = run("design", *SMALL, "--rounds", "2", "--folder", "kept", "--figure", "f.png", "--json")
    assert result.stderr.count("measured 16") == 1  # the first round is not measured again
    found = only_json(result)
    assert [row["measured"] for row in found["rounds"]] == [16, 32] and found["rounds"][0] == begun["rounds"][0]
    assert len(found["best"][0]["sequence"]) == 8 and found["best"][0]["activity"] == found["rounds"][1]["best"]
    assert "JASPAR" in found["task"]["real"] and 0 < found["designs"]["unique_share"] <= 1
    assert found["designs"]["kmer_correlation"] <= 1 and "held-out" in found["learned"]
    assert Path("f.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_a_table_of_folds(run) -> None:
    result = run("design", "--task", "rna-utr", *SMALL, "--rounds", "1")
    assert result.exit_code == 0, result.stderr
    assert "best measured: " in result.stdout and "real: the folding energies" in result.stdout


def test_bad_input_is_one_line(run) -> None:
    result = run("design", "--task", "dna-9mer")
    assert result.exit_code == 2 and "dna-8mer" in result.stderr and "Traceback" not in result.stderr
    assert run("design", "--figure", "f.txt").exit_code == 2


def test_heights_of_a_logo_are_bits() -> None:
    x = torch.tensor([[0, 0], [0, 1], [0, 2], [0, 3]])
    assert information(x, 4).tolist() == [[2.0, 0, 0, 0], [0.0, 0, 0, 0]]
    half = information(torch.tensor([[1], [2]]), 4)
    assert half.tolist() == [[0.0, 0.5, 0.5, 0.0]]  # one bit in all
    with pytest.raises(ValueError, match=r"tokens must have shape \(n, L\)"):
        information(torch.tensor([1, 2]), 4)


def test_what_is_said_of_designs_is_of_the_designs() -> None:
    """Of one sequence, drawn 16 times."""
    task = sequence_task("dna-8mer")
    x = task.encode(["GTAAACAA"]).repeat(16, 1)
    r = task.reward(x)
    found = judged(task, Design(x, r, torch.zeros(16, dtype=torch.int64)), x)
    said = found["designs"]
    assert said["activity"] == pytest.approx(float(r[0]), abs=1e-5) and said["activity"] > said["natural_activity"] + 5
    assert said["unique_share"] == 1 / 16 and said["edit_diversity"] == 0.0
    assert said["log_likelihood"] == pytest.approx(float(task.log_likelihood(x[:1])) / 8, abs=1e-5)
    assert found["best"][0] == {"sequence": "GTAAACAA", "activity": pytest.approx(float(r[0]))}
