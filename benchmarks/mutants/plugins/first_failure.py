"""A plugin of pytest that runs the tests of a list, in its order, and writes what it has seen as JSON: how many passed,
which is running, the first failure.

Written before every test too, so that a run which is killed has said in which one. Ids of tests may hold any character:
they come as JSON, not as arguments.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

_FILE = Path(os.environ["FIRST_FAILURE"])
_seen: dict[str, Any] = {"passed": 0, "running": "", "by": "", "how": ""}


def _write() -> None:
    _FILE.write_text(json.dumps(_seen))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if wanted := os.environ.get("CHOSEN"):
        place = {name: i for i, name in enumerate(json.loads(Path(wanted).read_text()))}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in place])
        items[:] = sorted((item for item in items if item.nodeid in place), key=lambda item: place[item.nodeid])


def pytest_runtest_logstart(nodeid: str) -> None:
    _seen["running"] = nodeid
    _write()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and not _seen["by"]:
        _seen.update(by=report.nodeid, how=_message(report))
    elif report.when == "call" and report.passed:
        _seen["passed"] += 1


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed and not _seen["by"]:
        _seen.update(by=f"collecting {report.nodeid}", how=str(report.longrepr).strip().splitlines()[-1][:160])


def _message(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr)).strip().splitlines()[0][:160]


def pytest_sessionfinish() -> None:
    _write()
