"""Small tensor helpers that every room uses: sums over events, noise-shaping matrices, early checks."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import RewardError
from .precision import call


def event_sum(x: Tensor, event_ndim: int) -> Tensor:
    """Sum over the last ``event_ndim`` dimensions (log-probabilities and KLs are sums over an event, never means)."""
    return x if event_ndim == 0 else x.flatten(x.ndim - event_ndim).sum(-1)


def is_matrix_scale(scale: Tensor, event_ndim: int) -> bool:
    """Whether ``scale`` is a matrix ``(1 | batch, d, m)``; otherwise it multiplies elementwise and broadcasts."""
    return scale.ndim == event_ndim + 2


def apply_scale(scale: Tensor, z: Tensor, event_ndim: int) -> Tensor:
    """``scale z`` for a scalar, diagonal ``(batch, *event)`` or matrix ``(1 | batch, d, m)`` scale."""
    if not is_matrix_scale(scale, event_ndim):
        return scale * z
    if scale.shape[0] == 1:
        return z @ scale[0].mT
    return (scale @ z.unsqueeze(-1)).squeeze(-1)


def apply_scale_transposed(scale: Tensor, z: Tensor, event_ndim: int) -> Tensor:
    """``scale^T z``."""
    return apply_scale(scale.mT, z, event_ndim) if is_matrix_scale(scale, event_ndim) else scale * z


def symmetric(matrix: Tensor) -> Tensor:
    """The symmetric part."""
    return 0.5 * (matrix + matrix.mT)


def batch_like(t: Tensor, x: Tensor) -> Tensor:
    """A per-row number ``(batch,)`` shaped to broadcast against ``(batch, *event)``; 0-d stays 0-d."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim)) if t.ndim else t


def nonfinite_rows(x: Tensor, rows_dim: int = 0) -> int:
    """How many rows of ``x`` have a NaN or an infinity."""
    bad = ~torch.isfinite(x)
    return int(bad.movedim(rows_dim, 0).flatten(1).any(1).sum()) if bad.ndim > 1 else int(bad.sum())


def as_float(name: str, value: Any, *, positive: bool = False, finite: bool = True) -> float:
    """A number as float, or an error that names the argument."""
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number, got {type(value).__name__}.") from error
    if finite and not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}.")
    if positive and not number > 0:
        raise ValueError(f"{name} must be > 0, got {number}.")
    return number


def check_count(name: str, value: Any, least: int = 1, optional: bool = False, why: str = "") -> None:
    """Raise unless ``value`` is an int of at least ``least`` (or None, where that is allowed); ``why`` so many, in a
    few words."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        more = f"{' or None' if optional else ''}{f' ({why})' if why else ''}"
        raise ValueError(f"{name} must be an int >= {least}{more}, got {value!r}.")


def check_positive(name: str, value: Any, below: float = math.inf, optional: bool = False) -> None:
    """Raise unless ``value`` is a number in (0, below) (or None, where that is allowed)."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < below:
        top = "" if below == math.inf else f" and < {below:g}"
        raise ValueError(f"{name} must be a finite number > 0{top}{' or None' if optional else ''}, got {value!r}.")


def check_tolerance(tolerance: Any, dtype: torch.dtype) -> float:
    """A tolerance of adaptive steps as float: their errors are differences of numbers of ``dtype``, and below its
    rounding they would shrink for hours.

    Raises:
        TypeError, ValueError: no number > 0; or one below what the dtype resolves.
    """
    tolerance, least = as_float("tolerance", tolerance, positive=True), 8 * torch.finfo(dtype).eps
    if tolerance < least:
        other = " or double precision" if dtype != torch.float64 else ""
        raise ValueError(f"tolerance={tolerance:g} is below what {dtype} resolves; use {least:.0e} or more{other}.")
    return tolerance


def check_tensor(
    name: str,
    value: Any,
    *,
    shape: tuple[int | str, ...] | None = None,
    hint: str = "",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``value`` as a finite tensor of the given shape (names in ``shape`` match any size), floating-point or
    ``dtype``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch tensor, got {type(value).__name__}. {hint}".rstrip())
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, got {value.dtype}.")
    if dtype is None and not value.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}; use {name}.float().")
    if shape is not None:
        fits = value.ndim == len(shape) and all(
            isinstance(want, str) or want == have for want, have in zip(shape, value.shape)
        )
        if not fits:
            text = ", ".join(str(s) for s in shape)
            raise ValueError(f"{name} must have shape ({text}), got {tuple(value.shape)}. {hint}".rstrip())
    if value.device.type != "meta" and not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} has {int((~torch.isfinite(value)).sum())} non-finite entries.")
    return value


def check_output(name: str, value: Any, want: torch.Size | tuple[int, ...], like: Tensor, hint: str = "") -> Tensor:
    """Check what a user's function returned: a tensor of the wanted shape, of the dtype and on the device of
    ``like``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must return a torch tensor, got {type(value).__name__}. {hint}".rstrip())
    if tuple(value.shape) != tuple(want):
        raise ValueError(f"{name} must return shape {tuple(want)}, got {tuple(value.shape)}. {hint}".rstrip())
    if value.dtype != like.dtype and not value.is_floating_point():
        raise TypeError(f"{name} returned dtype {value.dtype}, and is to return {like.dtype}: add .to({like.dtype}).")
    if value.dtype != like.dtype:
        raise TypeError(
            f"{name} returned dtype {value.dtype} for an input of dtype {like.dtype}; "
            f"make them agree (e.g. module.to({like.dtype}))."
        )
    if value.device != like.device:
        raise ValueError(f"{name} returned a tensor on {value.device} for an input on {like.device}; move one of them.")
    return value


def differ(a: Tensor, b: Tensor) -> bool:
    """Whether two results of one call differ by more than rounding in another order of sums."""
    a, b = a.detach().nan_to_num(), b.detach().nan_to_num()
    return not torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()) if a.numel() else 0.0)


def check_not_random(name: str, value: Tensor, again: Tensor) -> None:
    """Raise where a function of the step gave two values for the same states.

    Raises:
        ValueError: log-ratios are those of the step's noise alone, and paths are drawn again.
    """
    if differ(value, again):
        raise ValueError(
            f"{name} gave two values for the same states: it draws random numbers of its own, even in evaluation mode. "
            "Log-ratios are those of the step's noise, and paths are drawn again from their seed, so a step must be a "
            "function of state, time and noise alone."
        )


def check_recording(what: str) -> None:
    """Raise inside ``torch.inference_mode``, whose tensors take no part in gradients ever after.

    Raises:
        RuntimeError: naming it.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{what} was called inside torch.inference_mode(), and no gradient can be taken of the tensors made there. "
            "Call it outside, or use torch.no_grad()."
        )


def ask(name: str, function: Callable[..., Any], x: Tensor, *rest: Any) -> Any:
    """``function(x, *rest)`` of a function of the user's, which must leave the states x as they are: they are the
    path's own.

    Raises:
        ValueError: they were changed in place, as torch's version counter says.
    """
    before = 0 if x.is_inference() else x._version
    value = call(function, x, *rest)
    if not x.is_inference() and x._version != before:
        raise changed_in_place(name)
    return value


def changed_in_place(name: str) -> ValueError:
    """The error for a function that changes its arguments."""
    return ValueError(
        f"{name} changed the states or the time that it was given, in place; they are the path's own. Write it without "
        "in-place operations (x.clamp for x.clamp_, t = 2 * t for t *= 2), or begin with x = x.clone()."
    )


@contextlib.contextmanager
def probing(name: str, called_as: str, unconditional: str = "", arguments: Sequence[Any] = ()) -> Iterator[None]:
    """Name a user's function that fails at its first call, and say how it was called.

    Args:
        unconditional: the arguments beside a condition that it was called with ("x, t"); empty where there was none.
        arguments: which it must leave as they are, however it would change them (numpy and ``.data`` leave torch's
            version counter alone).

    Raises:
        TypeError, RuntimeError: its own, with its name. ValueError: it changed an argument.
    """
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    before = [(a.detach().clone(), a._version) for a in tensors]
    try:
        yield
    except TypeError as error:
        remedy = (
            f" The problem has a condition y, which every function of it is given; where {name} has no use for it, "
            f"pass lambda {unconditional}, y: {name}({unconditional})."
            if unconditional
            else ""
        )
        raise TypeError(f"{name} failed when called as {called_as}: {error}.{remedy}") from error
    except RewardError:
        raise  # it says itself what failed
    except RuntimeError as error:
        if "in-place operation" in str(error):
            raise changed_in_place(name) from error
        raise RuntimeError(f"{name} failed when called as {called_as}: {error}") from error
    for now, (value, version) in zip(tensors, before):
        if now._version != version or not torch.equal(now.detach().nan_to_num(), value.nan_to_num()):
            raise changed_in_place(name)
