"""Helpers of the command line's tests: commands run in this process, with a cache and a folder of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``run("solve", "ou-linear", ...)`` in a fresh folder; gives a result with ``exit_code``, ``stdout``,
    ``stderr``."""
    from sdecontrol.cli import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDECONTROL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> Result:
        return CliRunner().invoke(app, list(arguments))

    return call


def only_json(result: Result) -> dict:
    """The standard output as JSON, which must be all there is."""
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)
