"""Killed runs, full disks, damaged, foreign and malicious files: refused by name, nothing executed, nothing lost."""

import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import time

import pytest
import torch
from cases import random_lq
from runs import SCRIPT, quick, same

import sdecontrol as sc
from sdecontrol.files import bundles as files
from sdecontrol.files.bundles import read_bundle, write_bundle

TESTS = os.path.dirname(os.path.dirname(__file__))


@pytest.fixture(scope="module")
def problem():
    return random_lq(2, seed=1, dtype=torch.float32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, problem):
    folder = tmp_path_factory.mktemp("saved")
    solution = quick(problem, iterations=2)
    solution.save(folder)
    return folder, solution


def flip(path, position, bit):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("which", ["header", "tensors", "settings"])
def test_one_flipped_bit_anywhere_is_refused(tmp_path, problem, saved, which, seed):
    shutil.copytree(saved[0], tmp_path / "copy")
    path = next((tmp_path / "copy").glob("*.json" if which == "settings" else "*.safetensors"))
    size = path.stat().st_size
    header = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0] if which != "settings" else 0
    low, high = {"header": (0, header), "tensors": (header, size), "settings": (0, size)}[which]
    draw = random.Random(seed)
    flip(path, draw.randrange(low, high), draw.randrange(8))
    try:
        again = sc.load(tmp_path / "copy", problem)
    except sc.BadFileError:
        return
    # the few flips that change nothing: 1e-05 against 1E-05
    assert which == "settings" and same(again, saved[1]) and again.history == saved[1].history


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, -1])
@pytest.mark.parametrize("pattern", ["*.json", "*.safetensors"])
def test_a_file_cut_at_any_length_is_refused(tmp_path, problem, saved, keep, pattern):
    shutil.copytree(saved[0], tmp_path / "copy")
    path = next((tmp_path / "copy").glob(pattern))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(sc.BadFileError):
        sc.load(tmp_path / "copy", problem)


class Bomb:
    def __reduce__(self):
        return os.system, ("exit 1 && touch should-never-exist",)


def with_content(folder, content):
    """A bundle whose checksums are all right and whose tensor file is anything."""
    path = folder / "solution.json"
    body = json.loads(path.read_text())
    (folder / body["tensors"]).write_bytes(content)
    body["sha256"] = hashlib.sha256(content).hexdigest()
    body["settings_sha256"] = files.checksum(body)
    path.write_text(json.dumps(body))


HOSTILE = {
    "a pickle": pickle.dumps(Bomb()),
    "a header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a header of 2^40 bytes": struct.pack("<Q", 2**40) + b"{}",
    "a header that is no JSON": struct.pack("<Q", 4) + b"\xff\xfe\x00\x01",
    "offsets beyond the file": struct.pack("<Q", 59) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,9999999]}}',
    "nothing": b"",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_tensor_files_are_refused_and_not_executed(tmp_path, problem, saved, what, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved[0], tmp_path / "copy")
    with_content(tmp_path / "copy", HOSTILE[what])
    monkeypatch.setattr(pickle, "load", None)
    monkeypatch.setattr(pickle, "loads", None)
    with pytest.raises(sc.BadFileError):
        sc.load(tmp_path / "copy", problem)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, problem, saved, value):
    tensors, settings = read_bundle(saved[0], "solution", "solution")
    name = next(name for name, _ in saved[1].control.named_parameters())
    tensors[name] = torch.full_like(tensors[name], value)
    write_bundle(tmp_path, "solution", tensors, {k: v for k, v in settings.items() if k not in ("tensors", "sha256")})
    with pytest.raises(ValueError, match=rf"{name} has \d+ non-finite"):
        sc.load(tmp_path, problem)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/hostname", "a/../../b", "..", "", 7, None])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, problem, saved, name):
    body = {"format": "sdecontrol-1", "kind": "solution", "tensors": name, "sha256": ""}
    body["settings_sha256"] = files.checksum(body)
    (tmp_path / "solution.json").write_text(json.dumps(body))
    with pytest.raises(sc.BadFileError):
        sc.load(tmp_path, problem)


@pytest.mark.parametrize("text", ["[" * 200_000, "1" * 10_000, "[]", "null", '{"format": "sdecontrol-1"}', "\x00", "{"])
def test_absurd_settings_are_refused(tmp_path, problem, text):
    (tmp_path / "solution.json").write_text(text)
    with pytest.raises(sc.BadFileError):
        sc.load(tmp_path, problem)


FIELDS = "method settings seed reproducible control solution history details problem format schema kind tensors"


@pytest.mark.parametrize("key", FIELDS.split())
def test_settings_without_a_field_are_refused(tmp_path, problem, saved, key):
    shutil.copytree(saved[0], tmp_path / "copy")
    path = tmp_path / "copy" / "solution.json"
    body = json.loads(path.read_text())
    del body[key]
    body["settings_sha256"] = files.checksum(body)
    path.write_text(json.dumps(body))
    with pytest.raises(sc.BadFileError):
        sc.load(tmp_path / "copy", problem)


# ------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("call", ["fsync", "replace", "fdopen", "chmod"])
@pytest.mark.parametrize("error", [28, 30, 5, 122])  # no space, read-only, input/output, quota
@pytest.mark.parametrize("nth", [1, 2])
def test_whichever_call_of_a_write_fails_the_previous_solution_is_intact(
    tmp_path, problem, saved, monkeypatch, call, error, nth
):
    shutil.copytree(saved[0], tmp_path / "copy")
    real, calls = getattr(os, call), []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth:
            raise OSError(error, os.strerror(error))
        return real(*args, **kwargs)

    other = quick(problem, iterations=1)
    monkeypatch.setattr(files.os, call, failing)
    with pytest.raises(OSError) as caught:
        other.save(tmp_path / "copy")
    monkeypatch.undo()
    assert caught.value.errno == error
    assert same(sc.load(tmp_path / "copy", problem), saved[1])
    assert not list((tmp_path / "copy").glob(".*.part"))


FULL = """
import resource, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from runs import quick
import sdecontrol as sc
quick(iterations=4, checkpoint_every=2, checkpoint_dir={folder!r})
largest = max(p.stat().st_size for p in __import__("pathlib").Path({folder!r}).iterdir())
resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, largest // 2))
try:
    quick(iterations=4, checkpoint_every=2, checkpoint_dir={folder!r} + "/other")
except OSError as error:
    print("named", error.errno)
"""


@pytest.mark.slow
def test_a_real_limit_on_file_sizes_is_an_os_error_and_earlier_checkpoints_survive(tmp_path):
    code = FULL.format(tests=TESTS, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "named 27" in done.stdout, done.stderr
    for name in ("checkpoint-00000002", "checkpoint-00000004"):
        read_bundle(tmp_path, name, "checkpoint")
    assert not list((tmp_path / "other").glob("*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_folder_is_an_os_error(tmp_path, problem, saved):
    shutil.copytree(saved[0], tmp_path / "copy")
    (tmp_path / "copy").chmod(0o555)
    try:
        with pytest.raises(PermissionError):
            quick(problem, iterations=1).save(tmp_path / "copy")
        assert same(sc.load(tmp_path / "copy", problem), saved[1])
    finally:
        (tmp_path / "copy").chmod(0o755)


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_ends_in_the_bits_of_an_uninterrupted_one(tmp_path):
    """Checkpoints are written every other iteration, so many kills fall into a write."""
    draw = random.Random(0)

    def start(folder):
        code = SCRIPT.format(tests=TESTS, folder=str(folder)).replace("iterations=150", "iterations=1500")
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    killed = 0
    for _ in range(20):
        before = sorted((tmp_path / "killed").glob("checkpoint-*"))
        process = start(tmp_path / "killed")
        while process.poll() is None and sorted((tmp_path / "killed").glob("checkpoint-*")) == before:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.3))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
        process.stderr.close()
    assert killed >= 10
    for name in ("killed", "whole"):
        process = start(tmp_path / name)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err.decode()
    a, _ = read_bundle(tmp_path / "killed" / "done", "solution", "solution")
    b, _ = read_bundle(tmp_path / "whole" / "done", "solution", "solution")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
