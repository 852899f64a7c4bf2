"""A plugin of pytest that notes which lines of the package each test executes, and its CPU-seconds.

    TRACED=folder OMP_NUM_THREADS=1 python -m pytest -p benchmarks.mutants.traced_tests

What a fixture that several tests share executes is noted under the fixture, and which tests use it. A line of JSON is
written after every test, so that a run which is ended has what it has seen.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coverage
import pytest

FOLDER = Path(os.environ["TRACED"])
FOLDER.mkdir(parents=True, exist_ok=True)
_coverage = coverage.Coverage(
    data_file=str(FOLDER / "lines"), source=[str(Path.cwd() / "sdecontrol")], messages=False, config_file=False
)
_coverage.start()  # before the package is imported
_current: list[str] = [""]
_facts: dict[str, Any] = {}


def _switch(context: str) -> None:
    _current[0] = context
    _coverage.switch_context(context)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _facts.clear()
    _facts.update(name=item.nodeid, outcome="passed", fixtures=[])
    _switch(item.nodeid)
    began = time.process_time()
    try:
        return (yield)
    finally:
        _facts["seconds"] = round(time.process_time() - began, 4)
        _switch("")
        with (FOLDER / "tests.jsonl").open("a") as file:
            file.write(json.dumps(_facts) + "\n")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_fixture_setup(fixturedef: Any, request: Any) -> Iterator[Any]:
    if fixturedef.scope == "function" or not fixturedef.baseid:
        return (yield)
    before = _current[0]
    _switch(f"fixture {fixturedef.baseid}::{fixturedef.argname}")
    try:
        return (yield)
    finally:
        _switch(before)


def pytest_runtest_setup(item: Any) -> None:
    found = [d for name in item.fixturenames for d in item._fixtureinfo.name2fixturedefs.get(name, ())]
    _facts["fixtures"] = [f"fixture {d.baseid}::{d.argname}" for d in found if d.scope != "function" and d.baseid]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.outcome != "passed":
        _facts["outcome"] = report.outcome


def pytest_sessionfinish() -> None:
    _coverage.stop()
    _coverage.save()
