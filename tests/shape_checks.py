"""What ``pytest --shapes`` puts around functions of the package: the shapes in their signatures
(``sdecontrol/shapes.py``) are checked at every call, by beartype and jaxtyping."""

import functools
from collections.abc import Callable
from typing import Any, get_args

import torch
from beartype import beartype
from jaxtyping import AbstractArray, Shaped, install_import_hook
from torch import Tensor

#: rooms and modules that are checked
CHECKED = ("chains", "paths", "problems", "controls", "evaluation", "exact", "training")

#: names of dimensions that an attribute of an object settles
_SETTLED = {f"{name}_shape": Shaped[Tensor, f"*{name}"] for name in ("event", "noise")}


def _has_shapes(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    return any(_has_shapes(part) for part in get_args(annotation))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with the shapes among its annotations checked at each call. (Other types are pyright's to check; and
    the errors that users see for what they give wrong are the package's own, not beartype's.)

    Where the first argument (an object's own methods have it, too) has an ``event_shape`` or a ``noise_shape``,
    ``*event`` and ``*noise`` are these.
    """
    shapes = {name: part for name, part in function.__annotations__.items() if _has_shapes(part)}
    if not shapes:
        return function
    function.__annotations__ = shapes
    checked = beartype(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        known = getattr(args[0], "__dict__", {}) if args else {}
        for name, shape in _SETTLED.items():
            if isinstance(known.get(name), torch.Size):
                assert isinstance(torch.empty(known[name], device="meta"), shape), f"{name} has changed"
        return checked(*args, **kwargs)

    return call


def install() -> None:
    """Check what is imported from now on."""
    install_import_hook([f"sdecontrol.{name}" for name in CHECKED], "shape_checks.check")
