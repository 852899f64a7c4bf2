"""Several processes do what one does: to rounding, whatever is decided on the way; and where one fails all end."""

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_cases import CASES, FIRST, OF_THREE, numbers, quadratic
from rank_failures import RUN, run, uneven

from sdecontrol import ranks

HERE = Path(__file__).parent
ROUNDING = 1e-8  # of float64 numbers, through all iterations
WAIT = 120.0


def started(count: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """So many processes of one script, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    same = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    same |= {"LOCAL_WORLD_SIZE": str(count), "PYTHONPATH": str(HERE.parent)}
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **same, "RANK": str(i), "LOCAL_RANK": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=HERE,
        )
        for i in range(count)
    ]


def ended(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each; a minute is enough for all to end once one has."""
    found = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=WAIT)
            found.append((process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return found


def run_in(count: int, folder: Path, *names: str) -> list[dict[str, Any]]:
    """What each of several processes found, and how it ended."""
    folder.mkdir()
    done = ended(started(count, str(HERE / "rank_failures.py"), str(folder), *names))
    files = [folder / f"found.{i}" for i in range(count)]
    assert all(file.exists() for file in files), [errors for _, _, errors in done]
    ways = [{"status": status, "errors": errors} for status, _, errors in done]
    return [json.loads(file.read_text()) | {"folder": str(folder)} | way for file, way in zip(files, ways)]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> list[dict[str, Any]]:
    """One pair of processes for all quick tests; at last the second is killed."""
    return run_in(2, tmp_path_factory.mktemp("two") / "quick", *FIRST, "failures", "killed")


@pytest.fixture(scope="module")
def failed(of_two) -> list[dict[str, Any]]:
    """What each of two processes saw of all that rank_failures.py has."""
    return [found["failures"] | {"folder": found["folder"]} for found in of_two]


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two results differ by more than rounding."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a for d in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{where}/{i}")]
    if isinstance(a, float) and isinstance(b, float):
        same = (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=ROUNDING, abs_tol=ROUNDING)
        return [] if same else [f"{where}: {a!r} and {b!r}"]
    return [] if a == b else [f"{where}: {a!r} and {b!r}"]


def one_like(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    return json.loads(json.dumps(CASES[name]()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", FIRST)
def test_two_processes_find_what_one_finds(name: str, of_two) -> None:
    first, second = (found[name] for found in of_two)
    assert json.dumps(first) == json.dumps(second)  # nobody has gone another way
    assert not (found := differences(one_like(name), first)), found[:5]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("count", [2, 3])
def test_the_longer_runs_and_three_processes(count: int, tmp_path) -> None:
    names = [name for name in CASES if name not in (*FIRST, *OF_THREE)] if count == 2 else OF_THREE
    for found in run_in(count, tmp_path / "slow", *names):
        for name in names:
            assert not (wrong := differences(one_like(name), found[name])), (name, wrong[:5])


def messages(failed: list[dict[str, Any]], name: str) -> list[str]:
    return [found[name]["kind"] + ": " + found[name]["message"] for found in failed]


@pytest.mark.slow
def test_what_is_not_finite_in_one_process_stops_both(failed) -> None:
    """Both have the error, by the process' name, and the same last good solution, which they can evaluate together."""
    first, second = messages(failed, "not_finite")
    assert first.startswith("NonFiniteError: process 1 of 2: reward is not finite")
    assert second.startswith("NonFiniteError: reward is not finite")
    for name in ("control", "elbo"):
        assert failed[0]["not_finite"][name] == failed[1]["not_finite"][name]
    assert any(failed[0]["not_finite"]["control"])  # some steps were taken


def test_an_error_in_one_process_is_one_in_both(failed) -> None:
    first, second = messages(failed, "an_error_of_the_users")
    assert first == "RankError: LookupError in process 1 of 2: no such model"
    assert second == "LookupError: no such model"


def test_processes_that_go_different_ways_are_told_so(failed) -> None:
    for message in messages(failed, "other_ways"):
        assert "gone different ways" in message and "8 steps" in message and "9 steps" in message
    for message in messages(failed, "other_problems"):
        assert "different problems" in message and "its reward differs" in message
    for message in messages(failed, "other_settings"):
        assert "the run of process 1 differs from that of process 0 in seed (0 and 1)" in message


def test_batches_that_do_not_go_into_whole_blocks_are_refused(failed) -> None:
    for message in messages(failed, "a_batch_that_does_not_go"):
        assert message.startswith("ValueError: batch_size must be a multiple of 64 x 2 processes = 128")
    assert "group_size=128 x 2 processes" in failed[0]["a_batch_that_does_not_go"]["groups"]


def test_ctrl_c_in_one_process_stops_both_after_the_same_iteration(failed, tmp_path) -> None:
    """And what the first has written is resumed by one process, to what two would have found."""
    kinds = {found["interrupted"]["kind"] for found in failed}
    assert kinds == {"KeyboardInterrupt"}
    done = failed[0]["interrupted"]["done"]
    assert done == failed[1]["interrupted"]["done"] and 0 < done < RUN["iterations"]
    resumed = run(uneven(), checkpoint_dir=Path(failed[0]["folder"], "run"), resume=True)
    assert len(resumed.history) == RUN["iterations"]
    assert not differences(numbers(run(uneven())), numbers(resumed))


def test_a_step_that_only_one_process_sees_go_wrong_is_taken_back_by_both(failed) -> None:
    first, second = (found["step_taken_back"] for found in failed)
    assert first == second
    assert first["taken_back"][-1] == 1


def test_a_budget_is_measured_by_one_clock(failed) -> None:
    assert failed[0]["budget"] == failed[1]["budget"]


def test_one_process_reports_and_saves(failed) -> None:
    for found in failed:
        assert found["reports"] == {"lines": 6, "calls": [1, 2, 3, 4, 5, 6], "same": True}


def test_processes_may_work_alone(failed) -> None:
    first, second = (found["work_of_its_own"] for found in failed)
    assert first["control"] != second["control"]
    assert not differences(first, json.loads(json.dumps(numbers(run(quadratic(), seed=0)))))


def test_a_process_that_is_killed_ends_the_other(of_two) -> None:
    """By name, and without anything of torchrun's that would end them."""
    first, second = of_two
    assert first["status"] != 0 and second["status"] == 9
    assert "RankError: process 0 of 2 has lost process 1 at" in first["errors"]


@pytest.mark.slow
def test_what_is_not_finite_in_one_process_ends_both(tmp_path) -> None:
    for found in run_in(2, tmp_path / "end", "nonfinite"):
        assert found["status"] != 0 and "reward is not finite" in found["errors"]


@pytest.mark.slow
def test_the_example_prints_the_same_in_two_processes() -> None:
    example = str(HERE.parent / "examples" / "torchrun.py")
    one = subprocess.run([sys.executable, example, "--quick"], capture_output=True, text=True, timeout=WAIT)
    (first, printed, errors), (second, nothing, _) = ended(started(2, example, "--quick"))
    assert first == second == one.returncode == 0, errors
    assert printed == one.stdout and "log Z" in printed and not nothing


def test_one_process_exchanges_nothing() -> None:
    assert (ranks.size(), ranks.rank(), ranks.leads(), ranks.parts()) == (1, 0, True, 1)
    rows = torch.randn(6, 2)
    with ranks.split_batches(True):
        assert ranks.whole(rows) is rows and ranks.own(rows) is rows and ranks.mean(rows) is rows
    assert ranks.shares(1000, 64) is None


def test_rows_are_shared_in_whole_blocks(monkeypatch) -> None:
    monkeypatch.setattr(ranks, "size", lambda: 3)
    shares = ranks.shares(1000, 64)
    assert shares is not None and [row for share in shares for row in share] == list(range(1000))
    assert all(share.start % 64 == 0 and len(share) >= 5 * 64 - 24 for share in shares)
    assert ranks.shares(128, 64) is None  # not a block for each
