"""What bundles hold: tensors by parts, settings as JSON can hold them, and the facts by which they know their
problem."""

import json
import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadFileError
from ..processes.modules import load_plain_state, plain_names, plain_state
from ..tensors import check_tensor


def with_part(part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the name of the part of a bundle that they make up."""
    return {f"{part}.{name}": value for name, value in tensors.items()}


def part_of(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors of one part."""
    return {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}


def plain_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON can hold them (a grid as a list)."""
    steps = settings.get("time_steps")
    if steps is not None:
        steps = int(steps) if isinstance(steps, Integral) else [float(t) for t in steps]
    return {"time_steps": steps, "scheme": settings.get("scheme")}


def check_finite(module: nn.Module, tensors: dict[str, Tensor], every: bool = True) -> None:
    """Raise unless what a module has saved, or is to load, is finite: its parameters are finite, and its buffers are
    numbers or infinite (a mask of an attention is). Files are checked so when they are written and when they are read:
    what is saved can be loaded.

    Args:
        every: False: buffers are not looked at.

    Raises:
        ValueError: naming the tensor.
    """
    names = plain_names(module)
    buffers = {names.get(name, name) for name, _ in module.named_buffers()}
    for name, value in tensors.items():
        if not value.is_floating_point() or (name in buffers and not every):
            continue
        check_tensor(name, value.nan_to_num(math.nan, 0.0, 0.0) if name in buffers else value)


def load_tensors(module: nn.Module, tensors: dict[str, Tensor], path: Any, *, finite_buffers: bool = True) -> None:
    """Fill a module from saved tensors, all plain names and shapes matching.

    Args:
        finite_buffers: False: what training keeps of its course in buffers may be anything.

    Raises:
        BadFileError: naming what does not fit.
    """
    wanted, names = plain_state(module), plain_names(module)
    tensors = {names.get(name, name): value for name, value in tensors.items()}  # older files have wrappers' names
    for name in wanted.keys() | tensors.keys():
        if name not in tensors or name not in wanted:
            raise BadFileError(
                f"{path} does not fit this control: {name!r} is {'missing' if name not in tensors else 'extra'}."
            )
        if tensors[name].shape != wanted[name].shape or tensors[name].dtype != wanted[name].dtype:
            raise BadFileError(
                f"{path} does not fit this control: {name!r} is {tensors[name].dtype} "
                f"{tuple(tensors[name].shape)}, wanted {wanted[name].dtype} {tuple(wanted[name].shape)}."
            )
    check_finite(module, tensors, every=finite_buffers)
    load_plain_state(module, tensors)


def check_fingerprint(saved: Any, fingerprint: Callable[[bool], dict[str, Any]], path: Any) -> None:
    """Raise if a file belongs to another problem.

    Args:
        fingerprint: of the problem at hand (``ControlProblem.fingerprint``).

    Raises:
        BadFileError: naming what differs.
    """
    if not isinstance(saved, dict):
        raise BadFileError(f"{path} has no fingerprint of its problem.")
    former = saved.get("former") is True
    current = fingerprint(former)
    for key in ("reference", "alpha", "start", "initial", "conditional"):
        if saved.get(key) != json.loads(json.dumps(current[key])):
            raise BadFileError(
                f"{path} belongs to another problem: its {key} is {saved.get(key)!r}, this problem's {current[key]!r}."
            )
    numbers = saved.get("numbers", {})
    if former:  # draws of laws and of conditions have changed, and what was called with them
        numbers = {name: value for name, value in numbers.items() if name in current["numbers"]}
    for name, now in current["numbers"].items():
        if (then := numbers.get(name)) is None:
            raise BadFileError(f"{path} belongs to another problem: it had no {name}.")
        a, b = torch.tensor(then, dtype=torch.float64), torch.tensor(now, dtype=torch.float64)
        if a.shape != b.shape or not torch.allclose(
            a, b, rtol=1e-3, atol=1e-5 * max(1.0, float(b.abs().max())), equal_nan=True
        ):
            raise BadFileError(f"{path} belongs to another problem: its {name} differs from this one's.")
    if lost := numbers.keys() - current["numbers"].keys():
        raise BadFileError(f"{path} belongs to another problem: it had a {min(lost)}, this one has none.")
