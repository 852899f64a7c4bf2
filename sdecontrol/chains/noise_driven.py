"""Noise-driven chains, ``x_{k+1} = F_k(x_k, c_k + xi_k)`` with any map F: a simulator of the user's own, for instance.

The noises determine the path, so log-ratios are those of the noise and exact for any F, smooth or not, invertible or
not; weights towards ``exp(R/alpha)`` are exact for laws of states, too. A control shifts the noise. Over all laws of
the noise the optimum is ``p*(z | x) ~ N(z; 0, I) exp(v_{k+1}(F(x, z))/alpha)``; the best shift is O(h) from it only
where F is ``x + h b + sqrt(h) sigma z + ...``, and elsewhere a floor remains that no shift removes
(docs/mathematics.md, section 10). Particles in the space of noises have no such floor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..precision import at_least_single, call
from ..processes.reference import Reference
from ..shapes import Noises, Scalar, States
from ..tensors import check_count, check_output, probing
from .base import Chain


class NoiseDrivenChain(Reference, Chain):
    """Steps that are a function of state and noise, one unit of time each. Made by :func:`discrete_dynamics`."""

    continuous = gaussian = False

    def __init__(self, function: Callable[..., Any], steps: int, dim: int, noises: int, numpy: bool) -> None:
        self._drift = self.function = function
        self.numpy, self.reference, self.horizon = numpy, self, float(steps)
        self.dtype = self.device = None
        self.event_shape = torch.Size((dim,))
        self.noise_shape = self.control_shape = torch.Size((noises,))
        self.set_times(
            [float(k) for k in range(steps + 1)], at_least_single(torch.get_default_dtype()), torch.device("cpu")
        )

    def on(self, dtype: torch.dtype, device: torch.device) -> NoiseDrivenChain:
        made = copy.copy(self)
        made.reference = made
        made.set_times(self.clock, dtype, device)
        return made

    def _call(self, k: int, x: States, z: Noises, condition: Any) -> Any:
        rest = (k,) if condition is None else (k, condition)
        if not self.numpy:
            return call(self.function, x, z, *rest)
        plain = [part.detach().cpu().numpy() if isinstance(part, Tensor) else part for part in (x, z, *rest)]
        return torch.as_tensor(np.asarray(self.function(*plain)), dtype=x.dtype, device=x.device)

    def step(self, k: int, x: States, xi: Noises, c: Noises | None = None, condition: Any = None) -> States:
        return self._call(k, x, xi if c is None else xi + c, condition)

    def step_parts(self, k: int, x: States, condition: Any = None) -> list[tuple[str, Tensor]]:
        return [("step", self.step(k, x, x.new_zeros(len(x), *self.noise_shape), None, condition))]

    def probe(self, dtype: torch.dtype, device: torch.device, condition: Any = None) -> None:
        """Call the simulator on random states, check what it returns, and find out whether it is differentiable.

        Raises:
            TypeError, ValueError: what it returned and what it should; or it draws random numbers of its own.
        """
        x, xi = self.probe_states(5, dtype, device), torch.zeros(5, *self.noise_shape, dtype=dtype, device=device)
        y = None if condition is None else condition[torch.arange(5, device=condition.device) % len(condition)]
        called = f"step(x, w, k{'' if y is None else ', y'}), x {tuple(x.shape)}, w {tuple(xi.shape)}, k an int"
        hint = "A simulator in numpy needs discrete_dynamics(..., numpy=True)."
        with torch.no_grad(), probing("step", called, arguments=(x, y)):
            value, again = (self.step(0, x, xi + 0.5, None, y) for _ in range(2))
        check_output("step", value, x.shape, x, hint)
        if not torch.equal(value, again):
            raise ValueError(
                "step gave two results for the same state and noise: it must draw no random numbers of its own, since "
                "log-ratios are those of w. Make them functions of w (more noises, if need be)."
            )
        leaves = [part.clone().requires_grad_(True) for part in (x, xi)]
        with torch.enable_grad():
            value = self.step(0, leaves[0], leaves[1], None, y)
            self.differentiable = value.requires_grad and all(
                g is not None for g in torch.autograd.grad(value.sum(), leaves, allow_unused=True)
            )

    def differentiated(self, t: float) -> dict[str, Callable[..., Tensor]]:
        k = min(int(t), self.steps - 1)
        return {"step": lambda x, y=None: self.step(k, x, x.new_zeros(len(x), *self.noise_shape), None, y)}

    def numbers(self, x: States, t: Scalar, condition: Any = None) -> dict[str, Tensor]:
        k = min(int(t), self.steps - 1)
        return {"step": self.step(k, x, x[:, :1].expand(-1, self.noise_shape[0]), None, condition)}

    def describe(self) -> dict[str, Any]:
        shape, noises = list(self.event_shape), list(self.noise_shape)
        return {"kind": "discrete_dynamics", "event_shape": shape, "noises": noises, "steps": self.steps}


def discrete_dynamics(
    step: Callable[..., Any], steps: int = 60, dim: int = 1, noises: int = 1, numpy: bool = False
) -> NoiseDrivenChain:
    """A discrete-time system of your own: ``x_{k+1} = step(x_k, w_k, k)``, to be steered by shifting its noise.

    Time is counted in steps: ``t = k``, ``h = 1``, and running costs ``f(x, t)`` are stage costs, which are summed. A
    control ``u(x, t)``, ``(batch, noises)``, is added to the noise.

    Args:
        step: ``(x, w, k) -> x'`` (``(x, w, k, y)`` where the problem has a condition y): x ``(batch, dim)``, w
            ``(batch, noises)`` standard normal without control (scale it inside), k an int. A function of these alone:
            no random numbers of its own.
        steps: K, >= 1. dim: of a state. noises: of a step.
        numpy: hand it numpy arrays and take one back: then there is no gradient through it, and methods that need one
            refuse by name.

    Raises:
        TypeError, ValueError: naming the argument; what ``step`` returns is checked where a problem is made of it.
    """
    if not callable(step):
        raise TypeError(f"step must be a function (x, w, k) -> x', got {type(step).__name__}.")
    for name, value in (("steps", steps), ("dim", dim), ("noises", noises)):
        check_count(name, value)
    return NoiseDrivenChain(step, steps, dim, noises, numpy)
