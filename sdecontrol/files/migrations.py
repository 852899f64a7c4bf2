"""Older layouts of files, brought to the present one; each step raises the schema number by one."""

from typing import Any

import torch
from torch import Tensor

from ..errors import BadFileError

SCHEMA = 6  # of files as they are written now; without a number: 1

_SAMPLERS = {  # tensors of solutions that are ways of sampling
    "chains.steps": "chains.step_size",
    "chains.leaps": "chains.leapfrog_steps",
    "chains.apart": "chains.thin",
    "ladder.leaps": "ladder.leapfrog_steps",
}
_STATES = {"state.quiet": "state.unchanged", "state.calm": "state.since_taken_back"}  # of checkpoints
_PARAMETERS = (("gate", "langevin"), ("bent", "radial"))  # of networks, which alone have a time_weight
_SORTS = {"chains": "chains", "tempering": "tempered", "particles": "particles"}  # of solutions, by a field of theirs


def migrated(
    schema: int, tensors: dict[str, Tensor], settings: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings of the present schema, from those of an older one."""
    if schema < 2:
        _own_fields(settings)
    if schema < 3:
        tensors = _standard_names(tensors, settings)
        _former_numbers(settings)
    if schema < 4:
        _one_moment_loss(settings)
    if schema < 5:
        _uniform_euler(settings)
    if schema < 6 and "draws.log_w" in tensors:  # errors were over systems
        tensors = {**tensors, "draws.unit": torch.tensor(tensors["draws.log_w"].shape[1])}
    return tensors, settings


def _own_fields(settings: dict[str, Any]) -> None:
    """From 1 to 2: what a solution says beyond all others goes into a field of its own, networks and checkpoints get
    the fields that they came to have."""
    if settings["kind"] == "solution":
        own = {name: settings.pop(name) for name in (*_SORTS, "twist") if name in settings}
        sort = next((sort for name, sort in _SORTS.items() if name in own), "control")
        settings["solution"] = {"kind": sort, **own}
        _complete_networks(settings.get("control"))
    elif settings["kind"] == "checkpoint":  # the first ones knew no annealing of the temperature
        if isinstance(settings.get("identity"), dict):
            settings["identity"].setdefault("cooling", True)
        settings.setdefault("cooling", {"strength": 1.0, "first": None, "ended": 0})


def _complete_networks(saved: Any, start: bool = False) -> None:
    """Fields that networks of controls came to have, at any depth."""
    if isinstance(saved, dict):
        if saved.get("kind") == "network" and "gate" in saved:
            for name, value in {"gate_scale": 1.0, "nonlinear": False, "denoised": False, "start": start}.items():
                saved.setdefault(name, value)
        for name, part in saved.items():
            _complete_networks(part, name == "start")


def _standard_names(tensors: dict[str, Tensor], settings: dict[str, Any]) -> dict[str, Tensor]:
    """From 2 to 3: the standard names of the field."""
    if settings["kind"] == "checkpoint":
        _rename(settings, pace="schedule", cooling="annealing")
        _rename(settings.get("annealing"), strength="beta", ended="iterations")
        _rename(settings.get("identity"), cooling="anneal")
    elif settings["kind"] == "solution":
        _rename_networks(settings.get("control"))
        own = settings.get("solution")
        _rename(own.get("chains") if isinstance(own, dict) else None, leaps="leapfrog_steps")
    networks = {name.removesuffix("time_weight") for name in tensors if name.endswith("time_weight")}
    renamed = {f"{network}{former}": f"{network}{present}" for network in networks for former, present in _PARAMETERS}
    renamed |= _SAMPLERS if settings["kind"] == "solution" else _STATES
    return {renamed.get(name, name): value for name, value in tensors.items()}


def _rename_networks(saved: Any) -> None:
    """The fields of networks, at any depth."""
    if isinstance(saved, dict):
        if saved.get("kind") == "network":
            _rename(saved, gate="langevin", gate_scale="langevin_scale", nonlinear="radial_basis")
        for part in saved.values():
            _rename_networks(part)


def _former_numbers(settings: dict[str, Any]) -> None:
    """From 2 to 3: numbers of a problem were taken at states of torch's own seed; ``ControlProblem.fingerprint`` can
    still do that."""
    if isinstance(settings.get("problem"), dict):
        settings["problem"]["former"] = True


def _one_moment_loss(settings: dict[str, Any]) -> None:
    """From 3 to 4: the moment loss of log-variance, which learned log Z, is path consistency of whole paths."""
    history = settings.get("history")
    learned = isinstance(history, list) and any("learned_log_z" in row for row in history if isinstance(row, dict))
    if settings["kind"] == "solution" and settings.get("method") == "log-variance" and learned:
        settings["method"] = "path-consistency"
    identity = settings.get("identity")
    if not isinstance(identity, dict) or identity.get("method") != "log-variance":
        return
    own = identity.get("method_settings")
    if not isinstance(own, dict):
        return
    moment = own.pop("loss", "variance") == "moment"
    if moment and own.get("steps") is None and own.get("group_size") is None:
        identity["method"] = "path-consistency"
        identity["method_settings"] = {"n": "all", "paths": own.get("paths"), "replay": 0}


def _uniform_euler(settings: dict[str, Any]) -> None:
    """From 4 to 5: of a generative reference, a number of steps was so many equal ones, and no scheme was "euler".

    Raises:
        BadFileError: its exponential scheme, where a control is now held as the model's prediction is.
    """
    problem = settings.get("problem")
    reference = problem.get("reference") if isinstance(problem, dict) else None
    if not isinstance(reference, dict) or reference.get("kind") != "GenerativeSDE":
        return
    identity = settings.get("identity")
    for holder in (settings, identity):
        own = holder.get("settings") if isinstance(holder, dict) else None
        if not isinstance(own, dict):
            continue
        if own.get("scheme") == "exponential":
            raise BadFileError(
                "it was solved with scheme='exponential' of a generative reference by a version in which that scheme "
                "took controls another way: u held over a step, now the model's prediction. Its paths would have "
                "another law today. Solve the problem again, or load it with the version that saved it."
            )
        own["scheme"] = own.get("scheme") or "euler"
        steps = own.get("time_steps")
        steps = 100 if steps is None else steps
        if type(steps) is int:
            own["time_steps"] = [k / steps for k in range(steps)] + [1.0]


def _rename(saved: Any, **names: str) -> None:
    """Rename fields (former=present) of what is a dictionary, where they are."""
    if isinstance(saved, dict):
        for former, present in names.items():
            if former in saved:
                saved[present] = saved.pop(former)
