"""The precision of a chain's arithmetic: float32 at least, whatever precision the user's modules run in.

States, times, log-ratios and weights are sums of many small terms: in bfloat16 (8 bits) the times of a grid of 1000
steps coincide, and a process stands still. Two things are kept out of them. A *dtype*: a module of half precision gets
its inputs in its own dtype, and what it gives is cast back (:func:`call`, the one door). *Autocast*: inside
``with full_precision():``, which every verb and the integrator enter, it is off; at the door a module finds it as the
user has set it, so that mixed precision reaches models, controls and rewards that are modules, and nothing else.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T", Tensor, torch.dtype)

_DEVICES = ("cpu", "cuda")
_HALF = (torch.bfloat16, torch.float16)
#: the user's autocast, by device, where :func:`full_precision` has turned it off
_outside: ContextVar[dict[str, torch.dtype] | None] = ContextVar("outside", default=None)

_halves: ContextVar[list[torch.dtype] | None] = ContextVar("halves", default=None)


def at_least_single(value: T) -> T:
    """A dtype, or a tensor, as float32 where it is of half precision; itself otherwise."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in _HALF else value
    return torch.float32 if value in _HALF else value


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No autocast inside, but in the modules that :func:`call` calls. Also a decorator."""
    active = {device: torch.get_autocast_dtype(device) for device in _DEVICES if torch.is_autocast_enabled(device)}
    if not active:
        yield
        return
    token = _outside.set(active)
    try:
        with contextlib.ExitStack() as off:
            for device in active:
                off.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        _outside.reset(token)


@contextlib.contextmanager
def own_precision() -> Iterator[list[torch.dtype]]:
    """Modules run without the user's autocast inside; gives a list of the half precisions in which some have run."""
    found: list[torch.dtype] = []
    with full_precision():
        tokens = _outside.set(None), _halves.set(found)
        try:
            yield found
        finally:
            _outside.reset(tokens[0])
            _halves.reset(tokens[1])


def dtype_of(module: nn.Module) -> torch.dtype | None:
    """In which a module is called: its ``own_dtype`` where it says one (its parameters may be of several), else that of
    its first floating-point parameter or buffer; None where it has none."""
    if isinstance(own := getattr(module, "own_dtype", None), torch.dtype):
        return own
    tensors = (*module.parameters(), *module.buffers())
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)


def call(function: Callable[..., Tensor], x: Tensor, *more: Any) -> Tensor:
    """``function(x, *more)``; of a module of half precision in its dtype, of any module under the user's autocast. What
    a module gives in another precision for it has the dtype of x (of ``more``, where x are tokens)."""
    if not isinstance(function, nn.Module):
        return function(x, *more)
    own, outside = dtype_of(function), _outside.get()
    half = own in _HALF
    if not half and outside is None and not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
        return function(x, *more)
    given = [part for part in (x, *more) if isinstance(part, Tensor) and part.is_floating_point()]
    kind = at_least_single(given[0].dtype if given else torch.get_default_dtype())
    arguments = (x, *more)
    if half and own is not None:
        if (halves := _halves.get()) is not None:
            halves.append(own)
        arguments = tuple(
            part.to(own) if isinstance(part, Tensor) and part.is_floating_point() else part for part in arguments
        )
    with contextlib.ExitStack() as on:
        for device, dtype in (outside or {}).items():
            # without its cache of cast weights, which would outlive their updates inside the user's one block
            on.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=False))
        value = function(*arguments)
    lower = isinstance(value, Tensor) and value.dtype in _HALF
    return value.to(kind) if lower else value
