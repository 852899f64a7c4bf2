"""Older layouts of files, brought to the present one; each step raises the schema number by one."""

from typing import Any

SCHEMA = 2  # of files as they are written now; without a number: 1

_SORTS = {"chains": "chains", "tempering": "tempered", "particles": "particles"}  # of solutions, by a field of theirs


def migrated(schema: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of the present schema, from those of an older one.

    From 1 to 2 what a solution says beyond all others goes into a field of its own; networks get the fields that they
    came to have.
    """
    if schema == 2:
        return settings
    if settings["kind"] == "solution":
        own = {name: settings.pop(name) for name in (*_SORTS, "twist") if name in settings}
        sort = next((sort for name, sort in _SORTS.items() if name in own), "control")
        settings["solution"] = {"kind": sort, **own}
        _complete_networks(settings.get("control"))
    elif settings["kind"] == "checkpoint":  # the first ones knew no annealing of the temperature
        if isinstance(settings.get("identity"), dict):
            settings["identity"].setdefault("cooling", True)
        settings.setdefault("cooling", {"strength": 1.0, "first": None, "ended": 0})
    return settings


def _complete_networks(saved: Any, start: bool = False) -> None:
    """Fields that networks of controls came to have, at any depth."""
    if isinstance(saved, dict):
        if saved.get("kind") == "network" and "gate" in saved:
            for name, value in {"gate_scale": 1.0, "nonlinear": False, "denoised": False, "start": start}.items():
                saved.setdefault(name, value)
        for name, part in saved.items():
            _complete_networks(part, name == "start")
