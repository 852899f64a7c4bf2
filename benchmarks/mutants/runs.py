"""One mutant: planted in a copy of the package, run against the tests and checks that execute it."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .draw import Mutant
from .traces import PLUGINS, Traces, surroundings

__all__ = ["planted", "tried"]

_SLACK, _TIMES = 60.0, 3.0  # a run hangs after this many CPU-seconds and so many times those that it should take
_WALL = 1800.0  # seconds after which a run that waits for something is ended
_NONE_RAN = 5  # what pytest ends with then
_MEMORY = 8 << 30  # bytes of data of one process: a wrong shape may ask for all there is
Cell = dict[str, Any]


@contextmanager
def planted(tree: Path, mutant: Mutant) -> Iterator[None]:
    """The mutant is in the tree within it, and the file as it was after it."""
    file = tree / mutant.file
    source = file.read_bytes()
    file.write_bytes(mutant.change.apply(source))
    try:
        yield
    finally:
        file.write_bytes(source)


def tried(tree: Path, mutant: Mutant, traces: Traces, most: float, others: Sequence[str] | None = None) -> Cell:
    """What the tests, or checks, that execute a mutant say of it.

    Args:
        most: CPU-seconds of tests, as they were traced; those that take longer are not run.
        others: these tests, rather than the ones that were traced.
    """
    source = (tree / mutant.file).read_bytes()
    if others is None:
        names = traces.executing(mutant, source)
        chosen = _within(names, traces, most)
        planned = sum(traces.known[n]["seconds"] for n in chosen)
    else:  # of a commit that has them
        names = chosen = [name for name in others if (tree / name.split("::")[0]).exists()]
        planned = most
    if not names:
        return {"outcome": "not executed", "executing": 0}
    with planted(tree, mutant):
        seen = _run(tree, traces.what, chosen, _SLACK + _TIMES * planned)
    return {**seen, "executing": len(names), "tried": len(chosen)}


def _within(names: list[str], traces: Traces, most: float) -> list[str]:
    """The first of them that fit in ``most`` seconds, at least one."""
    left, found = most, []
    for name in names:
        seconds = traces.known[name]["seconds"]
        if seconds <= left or not found:
            found.append(name)
            left -= seconds
    return found


def _run(tree: Path, what: str, names: list[str], seconds: float) -> Cell:
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        seen, chosen = Path(folder) / "seen.json", Path(folder) / "chosen.json"
        told = {"FIRST_FAILURE": str(seen), "HYPOTHESIS_STORAGE_DIRECTORY": folder}
        if what == "tests":
            files = dict.fromkeys(name.split("::")[0] for name in names)
            options = ["-m", "pytest", "-x", "-p", "first_failure", "-p", "no:cacheprovider", *files]
            if all("::" in name for name in names):  # else whole files
                chosen.write_text(json.dumps(names))
                told["CHOSEN"] = str(chosen)
        else:
            options = [str(PLUGINS / "first_broken_check.py"), str(seen), *names]

        def limits() -> None:
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
            resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))

        try:
            process = subprocess.run(
                [sys.executable, *options],
                cwd=tree,
                env=surroundings(tree, **told),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_WALL,
                preexec_fn=limits,
            )
            code, said = process.returncode, process.stdout + process.stderr
        except subprocess.TimeoutExpired:
            code, said = -1, f"ended after {_WALL:.0f} s"
        found = (
            json.loads(seen.read_text()) if seen.exists() else {"passed": 0, "running": "start", "by": "", "how": ""}
        )
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
    return {**_outcome(code, found, said), "ran": found["passed"], "cpu_seconds": round(spent, 1)}


def _outcome(code: int, found: dict[str, Any], said: str) -> Cell:
    if found["by"]:
        return {"outcome": "killed", "by": found["by"], "how": _without_folders(found["how"])}
    if code < 0:  # ended by a limit, or by a crash of compiled code
        return {"outcome": "hung", "by": found["running"] or "start", "how": f"ended by signal {-code}"}
    if code == _NONE_RAN:  # ids that were not there yet
        return {"outcome": "survived"}
    if "file or directory not found" in said:
        raise RuntimeError(said)
    if code:
        last = (said.strip().splitlines() or [""])[-1]
        return {"outcome": "killed", "by": found["running"] or "start", "how": _without_folders(last[:160])}
    return {"outcome": "survived"}


def _without_folders(text: str) -> str:
    """A message without the folders of this machine."""
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", text)
