"""``Region``: where a process stops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..precision import call
from ..shapes import States
from ..tensors import check_output, probing
from .modules import Definition


class Region(Definition):
    """A set of states, at the first of which a process stops: ``ControlProblem(..., stop=Region(function))``; a
    function alone means the same, without the correction.

    Args:
        function: of the states alone, ``x (batch, *event) -> (batch,)``. Booleans: whether x is inside. Numbers: a
            level function phi, and ``phi(x) <= 0`` is inside.
        boundary_correction: enlarge the set by ``0.5826 sqrt(h) |sigma^T n|``, n its normal: where
            ``phi(x) <= 0.5826 sqrt(h) |sigma^T grad phi(x)|``. A chain looks at its path at the grid's times alone, and
            so meets a boundary that seems to lie that much farther away (Broadie, Glasserman & Kou 1997, Math. Finance
            7); with it hitting probabilities and exit times are those of continuous time up to o(sqrt(h)), without it
            up to O(sqrt(h)). It needs a level function with a gradient, equal steps, and a diffusion that does not
            change with time. False: the chain's own stopping, exactly.

    A set that moves with time, or a reward of the time of stopping, is one of a state that has the clock as a
    coordinate: drift 1 there, no noise, and it stops with the others.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], boundary_correction: bool = False) -> None:
        if not callable(function):
            raise TypeError(
                "stop must be a function x -> (batch,) of booleans, or of a level that is <= 0 where the process "
                f"stops; got {type(function).__name__}."
            )
        self.function, self.boundary_correction = function, bool(boundary_correction)
        #: whether the function is a level function; found out by the probe
        self.has_level = False

    def modules(self) -> list[Any]:
        return [self.function] if isinstance(self.function, torch.nn.Module) else []

    def _values(self, x: States) -> Tensor:
        return call(self.function, x)

    def contains(self, x: Tensor, event_ndim: int) -> Tensor:
        """Whether states ``(..., *event)`` are inside, ``(...)``; without the correction."""
        flat = x.flatten(0, x.ndim - event_ndim - 1)
        values = self._values(flat)
        inside = values if values.dtype == torch.bool else values <= 0
        return inside.reshape(x.shape[: x.ndim - event_ndim])

    def level(self, x: States) -> Tensor:
        """``phi(x)``, ``(batch,)``.

        Raises:
            ValueError: the function gives booleans.
        """
        values = self._values(x)
        if values.dtype == torch.bool:
            raise ValueError("stop gives booleans, and a level function is needed: numbers that are <= 0 inside.")
        return values

    def numbers(self, x: States) -> Tensor:
        """By which a file recognises it: its values, and whether it is enlarged."""
        values = self._values(x).double()
        return torch.cat((values, values.new_full((1,), float(self.boundary_correction))))

    def slope(self, x: States) -> tuple[Tensor, Tensor]:
        """``phi`` and its gradient, without a graph."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = x.detach().clone().requires_grad_(True)
            phi = self.level(leaf)
            gradient = torch.autograd.grad(phi.sum(), leaf)[0]
        return phi.detach(), gradient

    def probe(self, x: States) -> None:
        """Call the function on states ``(n, *event)`` and check what it returns.

        Raises:
            TypeError, ValueError: what is wrong with it.
        """
        with torch.no_grad(), probing("stop", f"stop(x), x {tuple(x.shape)}", arguments=(x,)):
            values, again = self._values(x), self._values(x)
        hint = "Booleans (inside or not), or numbers, <= 0 inside; one for each row."
        if isinstance(values, Tensor) and values.dtype == torch.bool:
            check_output("stop", values, (len(x),), values, hint)
        else:
            like = x if x.is_floating_point() else torch.zeros((), device=x.device)
            check_output("stop", values, (len(x),), like, hint)
        self.has_level = values.dtype != torch.bool
        if self.has_level and bool(values.isnan().any()):
            raise ValueError("stop is a level function and nan at some states; it must be a number everywhere.")
        if not torch.equal(values, again):
            raise ValueError("stop gave two values for the same states: it must not be random.")
        if self.has_level and bool((values == values[0]).all()):
            raise ValueError(
                f"stop is a level function that is constant ({float(values[0]):g} at all {len(x)} states tried): no "
                "path ever enters or leaves such a region. Return a number that is <= 0 inside and > 0 outside."
            )
        if self.boundary_correction:
            self._probe_slope(x)

    def _probe_slope(self, x: States) -> None:
        if not self.has_level or not x.is_floating_point():
            raise ValueError(
                "boundary_correction enlarges {phi <= 0} and needs a level function of states that are numbers, and "
                "this stop gives booleans; return phi(x) instead, or leave boundary_correction out."
            )
        try:
            gradient = self.slope(x)[1]
        except RuntimeError as error:
            raise ValueError(
                f"boundary_correction needs the gradient of the level function, which has none ({error}). Write it in "
                "torch operations, or leave boundary_correction out."
            ) from error
        if not bool(gradient.abs().sum() > 0):
            raise ValueError(
                "boundary_correction needs the gradient of the level function, which is 0 at all states tried; return "
                "a distance, not a number for inside and one for outside."
            )


def as_region(stop: Any) -> Region | None:
    """What a user gives as ``stop``."""
    return stop if stop is None or isinstance(stop, Region) else Region(stop)
