"""What the tables share: a finished cell is a JSON file, written at once or not at all, that names the versions it was
measured with."""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import sdecontrol as sc

__all__ = ["store", "versions"]

_NAMES = {"nautilus": "nautilus-sampler"}


def store(path: Path, cell: dict[str, Any], indent: int | None = 1) -> None:
    """Write a cell; a run that is killed leaves none, or the old one. ``indent=None``: on one line, where it holds
    images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(cell, indent=indent) + "\n")
    part.replace(path)


def versions(peer: str | None = None) -> dict[str, str | None]:
    """What is measured, and with what; where a peer is, its own version too."""
    other = {peer: metadata.version(_NAMES.get(peer, peer))} if peer not in (None, "sdecontrol") else {}
    return {
        **other,
        "sdecontrol": sc.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


@lru_cache
def _commit() -> str | None:
    """The commit that is measured, with a plus where files of the package differ from it; None outside of a
    repository."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).parents[1]
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "sdecontrol") else "")
    return None
