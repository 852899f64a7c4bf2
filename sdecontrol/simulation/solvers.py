"""torchsde's solvers on a problem's grid: higher order, Stratonovich, adaptive. Sampling only.

They have no Gaussian kernels, so their paths have no likelihood ratios; asking for one is a named error. What torchsde does
silently is done here in the open:

* **Steps.** torchsde's own loop adds up ``t += dt`` in floating point (a float32 grid of 50 steps takes 51). Here the loop
  is ours and torchsde's solver objects make one step each: K steps are K steps, on any grid, at float64 times.
* **Noise.** Increments come from :class:`~sdecontrol.randomness.SeededNoise`: the same seed and grid give the very noise
  of the Euler chain. The space-time integrals that "srk" needs come from a second stream of the same seed.
* **Noise types** are found by looking at the diffusion (:func:`noise_kind`), not declared: torchsde believes what it is told.
* **Milstein** runs in its derivative-free form: torchsde's other form multiplies by the transposed Jacobian where one noise
  drives several states, and silently takes the derivative as zero where there is none.
* **Stratonovich solvers** get the Ito-Stratonovich correction, so that every scheme samples the same process.

``torchsde._core`` is private, but torchsde is frozen at 0.2.6 (2023) and its public ``sdeint`` offers no way around its
clock on a grid that is not uniform.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

import torch
import torchsde
from torch import Tensor
from torchsde._core import base_sde, methods

from ..errors import NoLikelihood, NonFiniteError
from ..processes.sde import SDE
from ..randomness import derive_seed, global_rng
from ..tensors import apply_scale, check_output, is_matrix_scale, nonfinite_rows
from .chains import Chain
from .integrator import NoiseSource, RunningCost
from .paths import Paths

__all__ = [
    "SOLVERS",
    "ControlledSDE",
    "GridBrownian",
    "NoiseKind",
    "SolvedPaths",
    "Solver",
    "check_solver",
    "coarsen",
    "control_at",
    "make_stepper",
    "noise_kind",
    "solve_adaptively",
    "solve_on_grid",
]

_PLACE_TREE = 9
_KINDS = ("additive", "diagonal", "scalar", "general")


@dataclass(frozen=True)
class Solver:
    """What one of torchsde's solvers can do.

    Attributes:
        method: torchsde's name.
        ito: whether it solves Ito equations; else Stratonovich ones, with the correction of the drift.
        kinds: kinds of noise (:func:`noise_kind`) for which it converges at more than order 1/2.
        adaptive: kinds of noise for which adaptive steps converge to the right process (path-dependent steps need strong
            order 1 at least: Gaines & Lyons 1997).
        area: whether it needs the space-time integrals of the noise.
    """

    method: str
    ito: bool
    kinds: tuple[str, ...]
    adaptive: tuple[str, ...]
    area: bool = False


_COMMUTATIVE = ("additive", "diagonal", "scalar")
SOLVERS = {
    "milstein": Solver("milstein", True, _COMMUTATIVE, _COMMUTATIVE),
    "srk": Solver("srk", True, _COMMUTATIVE, _COMMUTATIVE, area=True),
    "heun": Solver("heun", False, _KINDS, _COMMUTATIVE),
    "midpoint": Solver("midpoint", False, _KINDS, _COMMUTATIVE),
    "euler-heun": Solver("euler_heun", False, _KINDS, _COMMUTATIVE),
    "reversible-heun": Solver("reversible_heun", False, _KINDS, ("additive",)),
}


@dataclass(frozen=True)
class NoiseKind:
    """The noise of an SDE, in torchsde's words.

    Attributes:
        name: "additive" (does not depend on the state), "diagonal" (each state has its own noise, whose strength depends on
            that state alone), "scalar" (one noise for all states), "general".
        matrix: the diffusion is a matrix ``(batch, d, m)``; else it multiplies elementwise.
    """

    name: str
    matrix: bool


def noise_kind(sde: SDE, x: Tensor, t: Tensor) -> NoiseKind:
    """Find the kind of noise by evaluating the diffusion around states x ``(batch, *event)`` at time t (0-d)."""
    few = x[:8] if len(x) >= 8 else x[:1].expand(8, *x.shape[1:])  # a few distinct states, all starts being perhaps one
    steps = torch.linspace(0.0, 0.2, 8, dtype=x.dtype, device=x.device).reshape(-1, *(1,) * (x.ndim - 1))
    x = few + steps * (1 + few.abs())
    leaf = x.detach().requires_grad_(True)
    with torch.enable_grad():
        sigma = sde.diffusion(leaf, t)
        reached = sigma.requires_grad and torch.autograd.grad(sigma.sum(), leaf, allow_unused=True)[0] is not None
    matrix = is_matrix_scale(sigma, sde.event_ndim)
    with torch.no_grad():
        moved = sde.diffusion(x + 0.1 * (1 + x.abs()), t)
        if not reached and _close(sigma.detach(), moved):
            return NoiseKind("additive", matrix)
        if matrix:
            return NoiseKind("scalar" if sigma.shape[-1] == 1 else "general", True)
        return NoiseKind("diagonal" if _own(sde, x, t) else "general", False)


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.isclose(a, b, rtol=1e-6, atol=0.0, equal_nan=True).all())


def _own(sde: SDE, x: Tensor, t: Tensor) -> bool:
    """Whether entry i of an elementwise diffusion depends on entry i of the state alone: moving other entries (a random
    half of them, several times) leaves it as it is."""
    base = sde.diffusion(x, t)
    if base.shape != x.shape:
        return x[0].numel() == 1
    generator = torch.Generator(device=x.device).manual_seed(0)
    for _ in range(8):
        moved = torch.rand(x.shape, generator=generator, device=x.device) < 0.5
        there = sde.diffusion(torch.where(moved, x + 0.1 * (1 + x.abs()), x), t)
        if not _close(there[~moved], base[~moved]):
            return False
    return True


def control_at(control: Any, x: Tensor, t: Tensor, condition: Any, shape: torch.Size) -> Tensor:
    """``u(x, t)`` of any control at a time t (0-d), which need not be on a grid."""
    if hasattr(control, "at"):
        return control.at(x, t, condition)
    t = t.expand(x.shape[0])
    u = control(x, t) if condition is None else control(x, t, condition)
    return check_output(
        "control", u, (x.shape[0], *shape), x, "A control is called as control(x, t), t (batch,)."
    )  # fmt: skip


class ControlledSDE:
    """``dX = (b + sigma u) dt + sigma dW`` in torchsde's protocol, on flattened states ``(batch, d)``.

    With ``stratonovich`` the drift is that of the Stratonovich equation of the same process, ``b + sigma u - c/2``,
    ``c = sum_j (d sigma_j/dx) sigma_j`` over the columns of sigma, by autograd.

    Args:
        control: any control, or None.
        diagonal: give elementwise noise as ``(batch, d)`` under torchsde's name "diagonal" (which is how its products with
            the noise are formed), whatever its kind.
    """

    def __init__(
        self,
        sde: SDE,
        kind: NoiseKind,
        control: Any = None,
        condition: Any = None,
        *,
        stratonovich: bool = False,
        diagonal: bool = False,
    ) -> None:
        self.sde, self.kind, self.control, self.condition = sde, kind, control, condition
        self.sde_type = "stratonovich" if stratonovich else "ito"
        self.noise_type = "diagonal" if diagonal and not kind.matrix else kind.name
        self.corrected = stratonovich and kind.name != "additive"

    def state(self, y: Tensor) -> Tensor:
        """``(batch, d)`` as ``(batch, *event)``."""
        return y.unflatten(1, self.sde.event_shape)

    def terms(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Drift, diffusion and control at states x ``(batch, *event)``."""
        t = t.to(x)
        drift, sigma, u = self.sde.drift(x, t, self.condition), self.sde.diffusion(x, t), None
        if self.control is not None:
            u = control_at(self.control, x, t, self.condition, self.sde.control_shape)
            drift = drift + apply_scale(sigma, u, self.sde.event_ndim)
        if self.corrected:
            drift = drift - 0.5 * self._correction(x, t)
        return drift, sigma, u

    def _correction(self, x: Tensor, t: Tensor) -> Tensor:
        create = torch.is_grad_enabled()
        with torch.enable_grad():
            leaf = x if create and x.requires_grad else x.detach().requires_grad_(True)
            sigma = self.sde.diffusion(leaf, t)
            if not sigma.requires_grad:
                raise TypeError(
                    "diffusion depends on the state but has no gradient (it left torch): Stratonovich solvers need its "
                    "derivative. Write it in torch operations, or use scheme='euler' or 'milstein'."
                )
            if self.kind.matrix:
                return _column_derivatives(sigma, leaf, create)
            if self.kind.name == "diagonal":  # the Jacobian is diagonal: its product with sigma is one product
                return torch.autograd.grad(sigma, leaf, sigma, create_graph=create)[0]
            flat = sigma.expand(leaf.shape).flatten(1)
            rows = [
                torch.autograd.grad(s.sum(), leaf, create_graph=create, retain_graph=True)[0].flatten(1)[:, i] * s
                for i, s in enumerate(flat.unbind(1))
            ]
            return torch.stack(rows, 1).reshape(leaf.shape)

    def product(self, sigma: Tensor, v: Tensor) -> Tensor:
        """``sigma v`` for flattened v ``(batch, m)``, flattened."""
        v = v if self.kind.matrix else self.state(v)
        return apply_scale(sigma, v, self.sde.event_ndim).flatten(1)

    # torchsde's protocol

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.terms(t, self.state(y))[0].flatten(1)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        x = self.state(y)
        return self._layout(self.sde.diffusion(x, t.to(x)), x)

    def _layout(self, sigma: Tensor, x: Tensor) -> Tensor:
        if self.kind.matrix:
            return sigma.expand(x.shape[0], *sigma.shape[1:])
        return sigma.expand(x.shape).flatten(1)

    def g_prod(self, t: Tensor, y: Tensor, v: Tensor) -> Tensor:
        x = self.state(y)
        return self.product(self.sde.diffusion(x, t.to(x)), v)

    def f_and_g(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = self.state(y)
        drift, sigma, _ = self.terms(t, x)
        return drift.flatten(1), self._layout(sigma, x)

    def f_and_g_prod(self, t: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        drift, sigma, _ = self.terms(t, self.state(y))
        return drift.flatten(1), self.product(sigma, v)


def _column_derivatives(sigma: Tensor, x: Tensor, create: bool) -> Tensor:
    """``sum_j (d sigma_j/dx) sigma_j`` over the columns of a matrix ``(batch, d, m)``: a Jacobian-vector product each, as the
    derivative of a vector-Jacobian product in its vector."""
    total: Any = 0
    for column in sigma.unbind(-1):
        v = torch.zeros_like(column, requires_grad=True)
        product = torch.autograd.grad(column, x, v, create_graph=True, retain_graph=True)[0]
        if product.requires_grad:
            one = torch.autograd.grad(product, v, column, create_graph=create, retain_graph=True, allow_unused=True)[0]
            total = total if one is None else total + one
    return total if isinstance(total, Tensor) else torch.zeros_like(x)


class GridBrownian(torchsde.BaseBrownian):
    """The increments of W over the steps of a grid, in torchsde's protocol; found by a step's times, so stateless.

    ``W = sqrt(h) xi`` and ``U = int (W_s - W_t) ds = h (W/2 + sqrt(h/12) eta)``: given W, U is independent noise around
    ``h W/2`` (the bridge's integral), so (W, U) has its exact joint law.

    Args:
        clock: the grid's K+1 times.
        noise: ``noise[offset + k]`` is xi of step k, ``(batch, *noise)``; the first ``width`` of its entries are used.
        area: the same for eta, or None.
        pad: append so many zeros to W (for states that have no noise).
    """

    def __init__(
        self,
        clock: Sequence[float],
        noise: NoiseSource,
        batch: int,
        width: int,
        like: Tensor,
        *,
        area: NoiseSource | None = None,
        offset: int = 0,
        pad: int = 0,
    ) -> None:
        self._clock, self._noise, self._area, self._offset, self._width = list(clock), noise, area, offset, width
        self._steps = {t: k for k, t in enumerate(self._clock[:-1])}
        self._shape, self._pad, self._like = (batch, width + pad), pad, like

    def __call__(
        self, ta: Tensor | float, tb: Tensor | float | None = None, return_U: bool = False, return_A: bool = False
    ) -> Any:
        k = self._steps.get(float(ta))
        if k is None or tb is None or float(tb) != self._clock[k + 1] or return_A:
            raise RuntimeError(f"increments are known over the steps of the grid only, not from {ta} to {tb}.")
        h = self._clock[k + 1] - self._clock[k]
        W = self._one(self._noise, k) * math.sqrt(h)
        if not return_U:
            return W
        assert self._area is not None
        return W, 0.5 * h * W + self._one(self._area, k) * (h * math.sqrt(h / 12))

    def _one(self, source: NoiseSource, k: int) -> Tensor:
        xi = source[self._offset + k].flatten(1)[:, : self._width]
        return torch.nn.functional.pad(xi, (0, self._pad)) if self._pad else xi

    def __repr__(self) -> str:
        return f"GridBrownian({len(self._steps)} steps, shape={self._shape})"

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        return self._like.device

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def levy_area_approximation(self) -> str:
        return "none" if self._area is None else "space-time"


def coarsen(clock: Sequence[float], noise: Tensor, areas: Tensor | None = None, every: int = 2) -> tuple[Any, ...]:
    """The same Brownian paths on a coarser grid: increments summed over ``every`` steps.

    Args:
        clock: ``(K+1,)`` times of the fine grid, K a multiple of ``every``.
        noise: ``(K, batch, *noise)`` standard normal numbers of its steps.
        areas: those of the space-time integrals ("srk"), or None.

    Returns:
        The coarse clock, noise ``(K/every, ...)`` and areas (or None), standard normal numbers again.
    """
    times = torch.as_tensor(clock, dtype=torch.float64)
    if (len(times) - 1) % every or noise.shape[0] != len(times) - 1:
        raise ValueError(f"coarsen needs one noise a step and a multiple of {every} steps, got {tuple(noise.shape)}.")
    h = (times[1:] - times[:-1]).to(noise).reshape(-1, every, *(1,) * (noise.ndim - 1))
    W = noise.unflatten(0, (-1, every)) * h.sqrt()
    H = h.sum(1)
    total = W.sum(1)
    coarse = (times[::every].tolist(), total / H.sqrt())
    if areas is None:
        return (*coarse, None)
    own = h * (0.5 * W + areas.unflatten(0, (-1, every)) * (h / 12).sqrt())
    U = (own + h * (W.cumsum(1) - W)).sum(1)  # int (W_s - W_a) ds over [a, c]: each step starts where W then is
    return (*coarse, (U - 0.5 * H * total) / (H * (H / 12).sqrt()))


def make_stepper(equation: ControlledSDE, solver: Solver, bm: Any, clock: Sequence[float]) -> tuple[Any, list[Tensor]]:
    """One of torchsde's solver objects, and the grid's times as float64 numbers on the CPU (its ``step`` wants tensors)."""
    chosen: Any = methods.select(solver.method, equation.sde_type)
    made = chosen(
        sde=base_sde.ForwardSDE(equation),
        bm=bm,
        dt=clock[1] - clock[0],
        adaptive=False,
        rtol=0.0,
        atol=0.0,
        dt_min=0.0,
        options={"grad_free": True} if solver.method == "milstein" else {},
    )
    return made, [torch.tensor(t, dtype=torch.float64) for t in clock]


class SolvedPaths(Paths):
    """Paths of a solver without Gaussian kernels: those of :class:`Paths`, less everything that needs likelihoods, which
    raises :class:`NoLikelihood`.

    Attributes:
        times: ``(K+1,)``; states: ``(K+1, batch, *event)``; end, samples: ``(batch, *event)``.
        running_cost: ``(batch,)``, ``int f dt`` by the trapezoidal rule on the grid.
        condition: what the paths were conditioned on, or None.
        scheme: the solver's name.
    """

    def __init__(
        self,
        scheme: str,
        chain: Chain,
        *,
        first: int,
        end: Tensor,
        running_cost: Tensor,
        condition: Any,
        states: list[Tensor] | None,
        replay: Callable[[], Paths] | None = None,
    ) -> None:
        super().__init__(
            chain,
            first=first,
            last=chain.steps,
            end=end,
            running_cost=running_cost,
            condition=condition,
            states=states,
            noises=None,
            shifts=None,
            sums=None,
            replay=replay,
        )
        self.scheme = scheme

    def __repr__(self) -> str:
        return (
            f"SolvedPaths({self.scheme!r}, {self.last - self.first} steps, batch={self.end.shape[0]}, "
            f"event={tuple(self.chain.event_shape)})"
        )

    def _refuse(self, what: str) -> NoReturn:
        raise NoLikelihood(
            f"{what}: paths of scheme={self.scheme!r} have none, since this solver has no Gaussian kernels. Simulate with "
            "scheme='euler' (or 'exact', 'exponential') for likelihood ratios, weights and KL."
        )

    def log_ratio(self, control: Any = None, per_step: bool = False) -> Tensor:
        self._refuse("log_ratio")

    def kl(self, per_step: bool = False) -> Tensor:
        self._refuse("kl")

    @property
    def noises(self) -> Tensor:
        self._refuse("noises")

    @property
    def shifts(self) -> Tensor:
        self._refuse("shifts")

    @property
    def controls(self) -> Tensor:
        self._refuse("controls")


def check_solver(scheme: str, kind: NoiseKind, adaptive: bool) -> Solver:
    """The solver of that name, if it can do this noise.

    Raises:
        ValueError: it cannot; with what can.
    """
    solver = SOLVERS[scheme]
    if kind.name not in solver.kinds:
        raise ValueError(
            f"scheme={scheme!r} has no order above 1/2 for {kind.name} noise (several noises drive one state, or one "
            "state's noise depends on another): it needs Levy areas that torchsde does not give it. Use scheme='heun' or "
            "'midpoint' (strong order 1/2 there), or 'euler'."
        )
    if adaptive and kind.name not in solver.adaptive:
        raise ValueError(
            f"tolerance: adaptive steps of scheme={scheme!r} with {kind.name} noise need not converge to the right process "
            "(Gaines & Lyons 1997). Leave tolerance out and use more time_steps."
        )
    return solver


def solve_on_grid(
    scheme: str,
    solver: Solver,
    equation: ControlledSDE,
    clock: Sequence[float],
    x: Tensor,
    bm: GridBrownian,
    running_cost: RunningCost | None,
    keep_states: bool,
    first: int = 0,
) -> tuple[list[Tensor], Tensor]:
    """Steps ``first, first+1, ...`` of a grid from states x ``(batch, *event)``.

    Returns:
        The states (all, or the last alone), and ``int f dt`` by the trapezoidal rule, ``(batch,)``.

    Raises:
        NonFiniteError: naming the quantity, the step and the number of rows.
    """
    stepper, times = make_stepper(equation, solver, bm, clock)
    y = x.flatten(1)
    extra = stepper.init_extra_solver_state(times[first], y)
    states, cost = [x], _Trapezoid(running_cost, equation.condition, x)
    cost.add(x, times[first])
    for k in range(first, len(clock) - 1):
        y, extra = stepper.step(times[k], times[k + 1], y, extra)
        state = equation.state(y)
        if not keep_states:
            states.clear()
        states.append(state)
        cost.add(state, times[k + 1])
    if not bool(torch.isfinite(y).all()) or not bool(torch.isfinite(cost.total).all()):
        if keep_states:
            raise explain(scheme, equation, clock, states, running_cost, first)
        raise NonFiniteError(f"state is not finite with scheme={scheme!r}.", what="state", rows=nonfinite_rows(y))
    return states, cost.total


class _Trapezoid:
    """``int f dt`` by the trapezoidal rule, state by state."""

    def __init__(self, f: RunningCost | None, condition: Any, like: Tensor) -> None:
        self.f, self.condition, self.total = f, condition, like.new_zeros(like.shape[0])
        self.last: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor, t: Tensor) -> None:
        if self.f is None:
            return
        here = self.f(x, t.to(x), self.condition)
        if self.last is not None:
            self.total = self.total + (here + self.last[0]) * (0.5 * float(t - self.last[1]))
        self.last = (here, t)


def explain(
    scheme: str,
    equation: ControlledSDE,
    clock: Sequence[float],
    states: Sequence[Tensor],
    running_cost: RunningCost | None,
    first: int = 0,
) -> NonFiniteError:
    """Find where a path stopped being finite, and what did it."""
    what, step, rows, more = "state", None, nonfinite_rows(states[-1]), ""
    with torch.no_grad():
        for j, (x, new) in enumerate(pairwise(states)):
            t = torch.tensor(clock[first + j], dtype=torch.float64).to(x)
            if running_cost is not None and (bad := nonfinite_rows(running_cost(x, t, equation.condition))):
                what, step, rows = "running cost", first + j, bad
                break
            if bool(torch.isfinite(new).all()):
                continue
            drift, sigma, u = equation.terms(t, x)
            plain = equation.sde.drift(x, t, equation.condition)
            suspects = {"drift": plain, "diffusion": sigma, "control": u, "Ito-Stratonovich correction": drift}
            what = next((n for n, v in suspects.items() if v is not None and not torch.isfinite(v).all()), "state")
            step, rows, more = first + j, nonfinite_rows(new), f" (largest |x| there: {float(x.abs().max()):.3g})"
            break
    where = "" if step is None else f" at step {step} of {len(clock) - 1} (t = {clock[step]:.4g})"
    return NonFiniteError(
        f"{what} is not finite{where} of scheme={scheme!r}, in {rows} row{'s' if rows != 1 else ''}{more}. Use more time "
        "steps, or check the drift, the diffusion and the control there.",
        what=what,
        step=step,
        rows=rows,
    )


def solve_adaptively(
    scheme: str,
    solver: Solver,
    equation: ControlledSDE,
    clock: Sequence[float],
    x: Tensor,
    seed: int,
    width: int,
    tolerance: float,
    running_cost: RunningCost | None,
) -> tuple[list[Tensor], Tensor]:
    """torchsde's adaptive stepping from each time of the grid to the next, relative and absolute error ``tolerance``.

    The noise is torchsde's ``BrownianInterval`` as a dyadic tree of this seed, so that another tolerance or grid sees the
    same Brownian path. The step is one for the whole batch (it is the root mean square of the errors that is controlled), so
    paths depend on the batch. Grid times are steps, never interpolated between steps.
    """
    span = clock[-1] - clock[0]
    kind = "space-time" if solver.area else "none"
    bm = torchsde.BrownianInterval(
        t0=clock[0],
        t1=clock[-1],
        size=(x.shape[0], width),
        dtype=x.dtype,
        device=x.device,
        entropy=derive_seed(seed, _PLACE_TREE) % 2**31,
        levy_area_approximation=kind,
        halfway_tree=True,
        tol=1e-8 * span,
    )
    states, y, extra = [x], x.flatten(1), None
    cost = _Trapezoid(running_cost, equation.condition, x)
    cost.add(x, torch.tensor(clock[0], dtype=torch.float64))
    options = {"grad_free": True} if solver.method == "milstein" else {}
    # sdeint probes with torch.randn: the global generator is to be left alone
    for k, (s, t) in enumerate(pairwise(clock)):
        try:
            with global_rng(seed, x.device), warnings.catch_warnings():
                warnings.filterwarnings("error", message="Hitting minimum")
                ys, extra = torchsde.sdeint(
                    equation,
                    y,
                    torch.tensor([s, t], dtype=torch.float64),
                    bm=bm,
                    method=solver.method,
                    dt=t - s,
                    adaptive=True,
                    rtol=tolerance,
                    atol=tolerance,
                    dt_min=1e-6 * span,
                    options=options,
                    extra=True,
                    extra_solver_state=extra if solver.method == "reversible_heun" else None,
                )  # type: ignore[misc]
        except AssertionError as error:
            raise NonFiniteError(
                f"state is not finite at step {k} of {len(clock) - 1} (t = {s:.4g}) of adaptive scheme={scheme!r}. Check the "
                "drift and the diffusion there.",
                what="state",
                step=k,
            ) from error
        except UserWarning as error:
            raise RuntimeError(
                f"tolerance={tolerance:g} asks for steps below 1e-6 of the horizon after t = {s:.4g} with scheme={scheme!r}; "
                "use a larger tolerance, or a fixed grid."
            ) from error
        y = ys[-1]
        states.append(equation.state(y))
        cost.add(states[-1], torch.tensor(t, dtype=torch.float64))
    _break_cycle(bm)
    if not bool(torch.isfinite(y).all()):
        raise explain(scheme, equation, clock, states, running_cost)
    return states, cost.total


def _break_cycle(bm: Any) -> None:
    """``BrownianInterval`` is a tree whose nodes know their parents: without this its noise would stay in memory until the
    next collection of cycles."""
    cache = getattr(bm, "_increment_and_space_time_levy_area_cache", None)
    if hasattr(cache, "clear"):
        cache.clear()  # type: ignore[union-attr]
    for name in ("_left_child", "_right_child", "_last_interval", "_top", "_w_h"):
        if hasattr(bm, name):
            setattr(bm, name, None)
