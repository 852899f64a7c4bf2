"""Gradients of a path cost by an adjoint equation that is solved backwards in time, with O(1) memory in the number of
steps.

The cost is that of ``gradients.py`` with integrals for its sums:
``mean [ terminal(X_T) + int (f/alpha + |u|^2/2) dt ]``, the integrals being two more states. Solvers and the adjoint
equation are torchsde's (Li et al. 2001.01328; Kidger et al. 2105.13493), stepped by our own loop for the reasons in
``solvers.py``, on the same noise as the chain's gradients.

* ``continuous-adjoint``: states are recomputed backwards together with the adjoint, which is an approximation of the
  gradient of no scheme in particular: biased by the discretisation, of order 1 in the step for additive noise (Euler,
  whose forward path is then the very path of the Euler chain) and 1/2 otherwise (Stratonovich midpoint against the
  Euler chain). Running a
  contracting process backwards expands its errors: strongly mean-reverting drifts need small steps, or the other modes.
* ``reversible-heun``: an algebraically reversible scheme with its adjoint: the exact gradient, to rounding, of that
  scheme's own cost, which converges to the continuous one with order 1 for additive noise.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.gaussian import EulerChain
from ..chains.shifts import shift_function
from ..errors import NonFiniteError
from ..processes.sde import SDE
from ..shapes import Controls, States
from ..tensors import nonfinite_rows
from .brownian import GridBrownian
from .equations import ControlledSDE, noise_kind
from .gradients import Objective, PathCost, backpropagate
from .integrator import NoiseSource, RunningCost, integrate
from .solvers import SOLVERS, Solver, make_stepper

CONTINUOUS_MODES = ("continuous-adjoint", "reversible-heun")

_EULER = Solver("euler", True, (), ())


class _CostedSDE:
    """A controlled SDE with ``int f dt`` and ``int |u|^2/2 dt`` as two more states, ``(batch, d + 2)``, in torchsde's
    protocol. The two have no noise."""

    def __init__(self, equation: ControlledSDE, running_cost: RunningCost | None, noise_type: str) -> None:
        self.equation, self.running_cost = equation, running_cost
        self.sde_type, self.noise_type = equation.sde_type, noise_type
        self.size = equation.sde.event_shape.numel()

    def _parts(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.equation.state(y[:, : self.size])
        drift, sigma, u = self.equation.terms(t, x)
        assert u is not None
        kl = 0.5 * (u * u).flatten(1).sum(1, keepdim=True)
        cost = torch.zeros_like(kl)
        if self.running_cost is not None:
            cost = self.running_cost(x, t.to(x), self.equation.condition).unsqueeze(1)
        return torch.cat((drift.flatten(1), cost, kl), 1), sigma, x

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self._parts(t, y)[0]

    def g_prod(self, t: Tensor, y: Tensor, v: Tensor) -> Tensor:
        x = self.equation.state(y[:, : self.size])
        return self._padded(self.equation.product(self.equation.sde.diffusion(x, t.to(x)), v))

    def f_and_g_prod(self, t: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        drift, sigma, _ = self._parts(t, y)
        return drift, self._padded(self.equation.product(sigma, v))

    def f_and_g(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        drift, sigma, x = self._parts(t, y)
        layout = self.equation._layout(sigma, x)
        return drift, torch.nn.functional.pad(layout, (0, 0, 0, 2)) if layout.ndim == 3 else self._padded(layout)

    @staticmethod
    def _padded(v: Tensor) -> Tensor:
        return torch.nn.functional.pad(v, (0, 2))


class _Narrow:
    """The first ``width`` entries of each step's noise."""

    def __init__(self, noise: NoiseSource, width: int) -> None:
        self.noise, self.width = noise, width

    def __getitem__(self, k: int) -> Tensor:
        return self.noise[k][:, : self.width]


def check_continuous(chain: Chain, mode: str) -> EulerChain:
    """The Euler chain (after a learned start, where there is one) whose equation the adjoint solves.

    Raises:
        ValueError: another chain, which stands for no stochastic differential equation that could be solved backwards.
    """
    main = chain.main
    if not isinstance(main, EulerChain) or not isinstance(main.reference, SDE):
        raise ValueError(
            f"gradient={mode!r} solves the adjoint of a stochastic differential equation and needs scheme='euler'; "
            f"here the paths are those of a {type(main).__name__}. Use gradient='adjoint' (exact for every chain), or "
            "scheme='euler'."
        )
    return main


def backpropagate_continuous(
    chain: Chain,
    control: Any,
    x0: States,
    noise: NoiseSource,
    objective: Objective,
    *,
    parameters: Sequence[Tensor],
    mode: str,
) -> PathCost:
    """:func:`sdecontrol.paths.gradients.backpropagate` with mode "continuous-adjoint" or "reversible-heun".

    The learned start is run as the chain it is, with its exact discrete adjoint.
    """
    main = check_continuous(chain, mode)
    x, early = x0, None
    if chain.start:
        first = chain.segments[0]
        early = _Narrow(noise, first.noise_shape[0]) if len(first.noise_shape) == 1 else noise

        def nothing(x: States, t: Tensor, y: Any = None) -> Controls:
            return x.new_zeros(x.shape[0], *first.control_shape)

        starter = getattr(control, "start", nothing)
        control = getattr(control, "main", control)
        with torch.no_grad():
            x = integrate(first, x0, early, shift_function(first, starter), keep="end").end
    solve = Backwards(main, control, noise, chain.start, x, objective, list(parameters), mode)
    y = solve.forward()
    d = main.event_shape.numel()
    end = y[:, :d].unflatten(1, main.event_shape).detach().requires_grad_(True)
    running, kl = y[:, d].detach(), y[:, d + 1].detach()
    if not bool(torch.isfinite(y).all()):
        raise NonFiniteError(
            f"state is not finite with gradient={mode!r}. Use more time steps, or check drift and diffusion.",
            what="state",
            rows=nonfinite_rows(y),
        )
    value, scale = objective.terminal(end), objective.weight / x.shape[0]
    slope = torch.autograd.grad(value.sum() * scale, end)[0].flatten(1)
    rest = torch.full_like(slope[:, :1], scale)
    at_start, gradients = solve.backward(torch.cat((slope, rest / objective.alpha, rest), 1))
    for p, g in zip(parameters, gradients):
        p.grad = g if p.grad is None else p.grad + g
    if chain.start:
        a = at_start.unflatten(1, main.event_shape) / scale
        cost = backpropagate(
            first,
            starter,
            x0,
            early,  # type: ignore[arg-type]
            Objective(lambda z: (z * a).flatten(1).sum(1), condition=objective.condition, weight=objective.weight),
            parameters=list(parameters),
            mode="adjoint",
        )
        kl = kl + cost.kl
    return PathCost(value.detach(), running, kl, end.detach())


class Backwards:
    """One batch through torchsde's solver, and back."""

    def __init__(
        self,
        chain: EulerChain,
        control: Any,
        noise: NoiseSource,
        offset: int,
        x: States,
        objective: Objective,
        parameters: list[Tensor],
        mode: str,
    ) -> None:
        sde = chain.reference
        kind = noise_kind(sde, x, chain.times[-1] * 0.5)
        self.reversible = mode == "reversible-heun"
        additive = kind.name == "additive"
        if additive and not self.reversible:
            self.solver = _EULER
        else:
            self.solver = SOLVERS["reversible-heun" if self.reversible else "midpoint"]
        diagonal = self.reversible and not kind.matrix
        equation = ControlledSDE(sde, kind, control, objective.condition, stratonovich=not self.solver.ito)
        name = "diagonal" if diagonal else "additive" if additive else "general"
        self.equation = _CostedSDE(equation, objective.running_cost, name)
        width, pad = sde.control_shape.numel(), 2 if diagonal else 0
        self.bm = GridBrownian(chain.clock, noise, x.shape[0], width, x, offset=offset, pad=pad)
        self.stepper, self.times = make_stepper(self.equation, self.solver, self.bm, chain.clock)  # type: ignore[arg-type]
        self.parameters = parameters
        self.y0 = torch.nn.functional.pad(x.detach().flatten(1), (0, 2))

    @torch.no_grad()
    def forward(self) -> Tensor:
        """The last states ``(batch, d + 2)``."""
        y = self.y0
        extra = self.stepper.init_extra_solver_state(self.times[0], y)
        for s, t in zip(self.times, self.times[1:]):
            y, extra = self.stepper.step(s, t, y, extra)
        self.end, self.extra = y, tuple(extra)
        return y

    @torch.no_grad()
    def backward(self, slope: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Gradients by the first states ``(batch, d)`` and by the parameters, from the one by the last
        ``(batch, d + 2)``."""
        from torchsde import ReverseBrownian
        from torchsde._core import adjoint_sde, base_sde, methods, misc

        extra = self.extra if self.reversible else ()
        parts = [self.end, slope, *(torch.zeros_like(e) for e in extra), *map(torch.zeros_like, self.parameters)]
        shapes = [part.shape for part in parts]
        adjoint = adjoint_sde.AdjointSDE(base_sde.ForwardSDE(self.equation), self.parameters, shapes)
        name = "adjoint_reversible_heun" if self.reversible else self.solver.method
        chosen: Any = methods.select(name, adjoint.sde_type)
        settings: dict[str, Any] = {"adaptive": False, "rtol": 0.0, "atol": 0.0, "dt_min": 0.0, "options": {}}
        stepper = chosen(sde=adjoint, bm=ReverseBrownian(self.bm), dt=1.0, **settings)
        state = misc.flatten(parts).unsqueeze(0)
        for s, t in zip(reversed(self.times[:-1]), reversed(self.times[1:])):
            state, extra = stepper.step(-t, -s, state, extra)
        _, at_start, *rest = misc.flat_to_shape(state.squeeze(0), shapes)
        if not self.reversible:
            return at_start[:, :-2], rest
        of_f, of_g, of_z, *gradients = rest
        with torch.enable_grad():  # the scheme starts from (f, g)(t_0, y_0) and z_0 = y_0: their part of the gradient
            y = self.y0.detach().requires_grad_(True)
            f, g = self.equation.f_and_g(self.times[0], y)
            more = misc.vjp((f, g), [y, *self.parameters], grad_outputs=[of_f, of_g], allow_unused=True)
        return (at_start + of_z + more[0])[:, :-2], [a + b for a, b in zip(gradients, more[1:])]
