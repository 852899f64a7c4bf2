"""The user's modules leave every call as they came: with their modes, flags, gradients and numbers; and copies own what
they hold."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

_lock = threading.RLock()
_modes: dict[int, tuple[nn.Module, bool]] = {}  # as they were when the first came
_flags: dict[int, tuple[Tensor, bool, Tensor | None]] = {}
_users: dict[int, int] = {}  # how many are inside, of each of both


def _enter(thing: Any) -> bool:
    """Whether it is the first to come."""
    _users[id(thing)] = _users.get(id(thing), 0) + 1
    return _users[id(thing)] == 1


def _leave(thing: Any) -> bool:
    """Whether it is the last to go."""
    _users[id(thing)] -= 1
    return not _users[id(thing)] and not _users.pop(id(thing))


@contextlib.contextmanager
def out_of_inference_mode() -> Iterator[None]:
    """As under ``torch.no_grad``, where it is ``torch.inference_mode``: controls take gradients inside."""
    if not torch.is_inference_mode_enabled():
        yield
    else:
        with torch.inference_mode(False), torch.no_grad():  # leaving it alone would ask for gradients
            yield


@contextlib.contextmanager
def evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Modules in evaluation mode, and no inference mode, which would leave no gradients to take.

    Whoever comes first finds their modes, and the last to go restores them: several threads may be inside at once.
    """
    parts = [m for module in modules for m in module.modules()]
    with _lock:
        for m in parts:
            if _enter(m):
                _modes[id(m)] = m, m.training
        for module in modules:
            if any(m.training for m in module.modules()):
                module.eval()
    try:
        with out_of_inference_mode():
            yield
    finally:
        with _lock:
            for m in parts:
                if _leave(m):
                    m.training = _modes.pop(id(m))[1]


@contextlib.contextmanager
def held_fixed(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Parameters that take no gradients; the last to go restores their flags and gradients, as in
    :func:`evaluating`."""
    with _lock:
        for p in parameters:
            if _enter(p):
                _flags[id(p)] = p, p.requires_grad, p.grad
                p.requires_grad_(False)
    try:
        yield
    finally:
        with _lock:
            for p in parameters:
                if _leave(p):
                    _, flag, p.grad = _flags.pop(id(p))
                    p.requires_grad_(flag)


@contextlib.contextmanager
def standing_in(places: Sequence[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    """Tensors as the parameters of modules ``(module, name, tensor)``, for what asks a module for its parameters (their
    dtype, say) in the midst of a call; those that were there come back."""
    before = [part._parameters.get(name) for part, name, _ in places]
    known = [name in part._parameters for part, name, _ in places]
    for part, name, tensor in places:
        part._parameters[name] = tensor  # type: ignore[assignment]
    try:
        yield
    finally:
        for (part, name, _), parameter, there in zip(places, before, known):
            if there:
                part._parameters[name] = parameter
            else:
                part._parameters.pop(name, None)


#: attributes by which wrappers hold a module: of ``torch.compile``, and of data parallelism
_WRAPPED = "_orig_mod", "module"


def _held_by(module: nn.Module) -> str | None:
    """By which attribute a wrapper holds its module; None of what is none."""
    if _WRAPPED[0] in module._modules:  # of its own: PEFT's hand on what their base has
        return _WRAPPED[0]
    parallel = isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    return _WRAPPED[1] if parallel else None


def unwrapped(module: Any) -> Any:
    """What ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel`` have wrapped; others themselves."""
    while isinstance(module, nn.Module) and (name := _held_by(module)) is not None:
        module = getattr(module, name)
    return module


def without_compiling(module: nn.Module) -> nn.Module:
    """A module whose own and whose parts' wrappers are gone; the parts are changed in place."""
    module = unwrapped(module)
    for name, part in module.named_children():
        if (inner := without_compiling(part)) is not part:
            setattr(module, name, inner)
    return module


def plain_names(module: nn.Module) -> dict[str, str]:
    """Names in ``module.state_dict()`` -> what they are without the parts that such wrappers add."""
    held = [(name, own) for name, part in module.named_modules() if (own := _held_by(part)) is not None]
    found = {name: name for name in module.state_dict()}
    for name, own in sorted(held, key=lambda pair: -len(pair[0])):  # inner ones first
        outer = f"{name}." if name else ""
        prefix = f"{outer}{own}."
        found |= {key: outer + plain[len(prefix) :] for key, plain in found.items() if plain.startswith(prefix)}
    return found


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """What a module has to save, by plain names: a compiled or data-parallel model has those of the model itself."""
    state, names = module.state_dict(), plain_names(module)
    return {names[name]: value for name, value in state.items()}


def load_plain_state(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Fill a module by plain names, all of them."""
    own = {plain: name for name, plain in plain_names(module).items()}
    module.load_state_dict({own.get(name, name): value for name, value in tensors.items()})


def modules_in(*things: Any) -> list[nn.Module]:
    """Those that are modules."""
    return [thing for thing in things if isinstance(thing, nn.Module)]


def numbers_of(modules: Sequence[nn.Module]) -> Tensor:
    """By which a change of parameters or buffers is seen: the sum and the sum of squares of each, ``(count, 2)``."""
    with torch.no_grad():
        found = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        parts = [torch.view_as_real(t) if t.is_complex() else t for t in found]
        tensors = [(t if t.dtype in (torch.float32, torch.float64) else t.double()).flatten() for t in parts]
        sums = [torch.stack((t.sum().double(), torch.dot(t, t).double())).cpu() for t in tensors]
    return torch.stack(sums) if sums else torch.zeros(0, 2, dtype=torch.float64)


# ---------------------------------------------------------------- copies

_sharing: ContextVar[bool] = ContextVar("sharing", default=False)


class Definition:
    """Base of problems, processes and chains. ``copy.deepcopy`` of one has modules, tensors and caches of its own (what
    a function closes over is not copied: Python copies no function). A control that :func:`copied` copies goes on
    referring to the same ones."""

    def modules(self) -> list[nn.Module]:
        """The user's modules in it."""
        return []

    def forget(self) -> None:
        """Drop what is remembered: a copy finds its own."""

    def __deepcopy__(self: T, memo: Any) -> T:
        if _sharing.get():
            return self
        made = copy.copy(self)
        memo[id(self)] = made
        for module in self.modules():  # type: ignore[attr-defined]
            _own_leaves(module, memo)
        for name, value in list(vars(made).items()):
            setattr(made, name, copy.deepcopy(value, memo))
        made.forget()  # type: ignore[attr-defined]
        return made


def copied(thing: T, shared: Sequence[Tensor] = ()) -> T:
    """A deep copy of a module, a control or a state of training, which shares the problem, process and chain that it
    refers to, and the tensors in ``shared``. Its modes and flags are the module's own, also while another thread holds
    that in evaluation mode, or its parameters fixed."""
    memo: dict[int, Any] = {id(t): t for t in shared}
    if isinstance(thing, nn.Module):
        _own_leaves(thing, memo)
    token = _sharing.set(True)
    try:
        with _lock:
            made = copy.deepcopy(thing, memo)
            if isinstance(thing, nn.Module) and isinstance(made, nn.Module):
                _as_they_were(thing, made)
            return made
    finally:
        _sharing.reset(token)


def _as_they_were(module: nn.Module, made: nn.Module) -> None:
    """Give a copy the modes and flags that the module had before anybody entered."""
    for part, own in zip(module.modules(), made.modules()):
        if id(part) in _modes and own is not part:
            own.training = _modes[id(part)][1]
    for p, own in zip(module.parameters(), made.parameters()):
        if id(p) in _flags and own is not p:
            own.requires_grad_(_flags[id(p)][1])


def _own_leaves(module: nn.Module, memo: dict[int, Any]) -> None:
    """Weights that ``torch.nn.utils.weight_norm`` and ``spectral_norm`` make before every call are no leaves, which
    torch cannot copy; the copy makes its own."""
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
