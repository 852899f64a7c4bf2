"""The package's cache: bundles (safetensors and JSON) in the user's cache folder, made again where they are damaged."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import BadFileError, warn
from ..files.bundles import read_bundle, write_bundle


def cache_folder() -> Path:
    """$SDECONTROL_CACHE, else $XDG_CACHE_HOME/sdecontrol, else ~/.cache/sdecontrol."""
    if own := os.environ.get("SDECONTROL_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "sdecontrol"


def _warn(message: str) -> None:
    warn(message, RuntimeWarning, stacklevel=4)


def read_cached(
    name: str, kind: str, report: Callable[[str], None] = _warn
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """A cached bundle, or None where there is none or it is damaged (which is reported)."""
    folder = cache_folder()
    if not (folder / f"{name}.json").exists():
        return None
    try:
        return read_bundle(folder, name, kind)
    except (BadFileError, OSError) as error:
        report(f"the cache is damaged and will be made again: {error}")
        return None


def write_cached(
    name: str,
    kind: str,
    tensors: dict[str, Tensor],
    settings: dict[str, Any],
    report: Callable[[str], None] = _warn,
) -> None:
    """Write a bundle to the cache; a cache that cannot be written is reported, and no error."""
    try:
        write_bundle(cache_folder(), name, tensors, {"kind": kind, **settings})
    except OSError as error:
        report(f"nothing could be cached in {cache_folder()} ({error}); set SDECONTROL_CACHE to another folder.")
