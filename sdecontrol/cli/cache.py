"""The package's cache (:mod:`sdecontrol.library.cache`), its troubles as lines on standard error."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..library import cache
from ..library.cache import cache_folder
from .common import note

__all__ = ["cache_folder", "read_cached", "write_cached"]


def read_cached(name: str, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """A cached bundle, or None where there is none or it is damaged."""
    return cache.read_cached(name, kind, note)


def write_cached(name: str, kind: str, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Write a bundle to the cache."""
    cache.write_cached(name, kind, tensors, settings, note)
