"""torchsde's solvers on a problem's grid: higher order, Stratonovich, adaptive. Sampling only.

They have no Gaussian kernels, so their paths have no likelihood ratios; asking for one is a named error. What torchsde
does silently is done here in the open:

* **Steps.** torchsde's own loop adds up ``t += dt`` in floating point (a float32 grid of 50 steps takes 51). Here the
  loop is ours and torchsde's solver objects make one step each: K steps are K steps, on any grid, at float64 times.
* **Noise.** Increments come from :class:`~sdecontrol.randomness.SeededNoise`: the same seed and grid give the very
  noise of the Euler chain. The space-time integrals that "srk" needs come from a second stream of the same seed.
* **Noise types** are found by looking at the diffusion (``equations.noise_kind``), not declared: torchsde believes what
  it is told.
* **Milstein** runs in its derivative-free form: torchsde's other form multiplies by the transposed Jacobian where one
  noise drives several states, and silently takes the derivative as zero where there is none.
* **Stratonovich solvers** get the Ito-Stratonovich correction, so that every scheme samples the same process.

``torchsde._core`` is private, but torchsde is frozen at 0.2.6 (2023) and its public ``sdeint`` offers no way around its
clock on a grid that is not uniform.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import NoLikelihood, NonFiniteError
from ..randomness import Place, derive_seed, global_rng
from ..shapes import ControlPaths, NoisePaths, PerPath, PerStep, Scalar, States
from ..tensors import nonfinite_rows
from .brownian import GridBrownian
from .equations import ControlledSDE, NoiseKind
from .integrator import RunningCost
from .paths import Paths

_KINDS = ("additive", "diagonal", "scalar", "general")


@dataclass(frozen=True)
class Solver:
    """What one of torchsde's solvers can do.

    Attributes:
        scheme: its name here; method: torchsde's.
        ito: whether it solves Ito equations; else Stratonovich ones, with the correction of the drift.
        kinds: kinds of noise (``equations.noise_kind``) that it is given: "milstein" and "srk" would silently fall back
            to order 1/2 for others. Stratonovich solvers have order 1/2 for "general" noise, 1 for the others.
        adaptive: kinds of noise for which adaptive steps converge to the right process (path-dependent steps need
            strong order 1 at least: Gaines & Lyons 1997).
        area: whether it needs the space-time integrals of the noise.
    """

    scheme: str
    ito: bool
    kinds: tuple[str, ...]
    adaptive: tuple[str, ...]
    area: bool = False

    @property
    def method(self) -> str:
        return self.scheme.replace("-", "_")


_COMMUTATIVE = ("additive", "diagonal", "scalar")
_ALL = (
    Solver("milstein", True, _COMMUTATIVE, _COMMUTATIVE),
    Solver("srk", True, _COMMUTATIVE, _COMMUTATIVE, area=True),
    Solver("heun", False, _KINDS, _COMMUTATIVE),
    Solver("midpoint", False, _KINDS, _COMMUTATIVE),
    Solver("euler-heun", False, _KINDS, _COMMUTATIVE),
    Solver("reversible-heun", False, _KINDS, ("additive",)),
)
SOLVERS = {solver.scheme: solver for solver in _ALL}


def make_stepper(equation: ControlledSDE, solver: Solver, bm: Any, clock: Sequence[float]) -> tuple[Any, list[Tensor]]:
    """One of torchsde's solver objects, and the grid's times as float64 numbers on the CPU (its ``step`` wants
    tensors)."""
    from torchsde._core import base_sde, methods

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


@dataclass(eq=False, repr=False)
class SolvedPaths(Paths):
    """Paths of a solver without Gaussian kernels: those of :class:`Paths`, less everything that needs likelihoods,
    which raises :class:`NoLikelihood`.

    Attributes:
        times: ``(K+1,)``; states: ``(K+1, batch, *event)``; end, samples: ``(batch, *event)``.
        running_cost: ``(batch,)``, ``int f dt`` by the trapezoidal rule on the grid.
        condition: what the paths were conditioned on, or None.
        scheme: the solver's name.
    """

    scheme: str = ""

    def __repr__(self) -> str:
        return (
            f"SolvedPaths({self.scheme!r}, {self.steps} steps, batch={len(self)}, "
            f"event={tuple(self.chain.event_shape)})"
        )

    def _refuse(self, what: str) -> NoReturn:
        raise NoLikelihood(
            f"{what}: paths of scheme={self.scheme!r} have none, since this solver has no Gaussian kernels. Simulate "
            "with scheme='euler' (or 'exact', 'exponential') for likelihood ratios, weights and KL."
        )

    def log_ratio(self, control: Any = None, per_step: bool = False) -> PerPath | PerStep:
        self._refuse("log_ratio")

    def kl(self, per_step: bool = False) -> PerPath | PerStep:
        self._refuse("kl")

    @property
    def noises(self) -> NoisePaths:
        self._refuse("noises")

    @property
    def shifts(self) -> NoisePaths:
        self._refuse("shifts")

    @property
    def controls(self) -> ControlPaths:
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
            "state's noise depends on another): it needs Levy areas that torchsde does not give it. Use scheme='heun' "
            "or 'midpoint' (strong order 1/2 there), or 'euler'."
        )
    if adaptive and kind.name not in solver.adaptive:
        raise ValueError(
            f"tolerance: adaptive steps of scheme={scheme!r} with {kind.name} noise need not converge to the right "
            "process (Gaines & Lyons 1997). Leave tolerance out and use more time_steps."
        )
    return solver


def solve_on_grid(
    solver: Solver,
    equation: ControlledSDE,
    clock: Sequence[float],
    x: States,
    bm: GridBrownian,
    running_cost: RunningCost | None,
    keep_states: bool,
    first: int,
) -> tuple[list[States], PerPath]:
    """Steps ``first, first+1, ...`` of a grid from states x.

    Returns:
        The states (all, or the last alone), and ``int f dt`` by the trapezoidal rule.

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
            raise explain(solver.scheme, equation, clock, states, running_cost, first)
        raise NonFiniteError(
            f"state is not finite with scheme={solver.scheme!r}.", what="state", rows=nonfinite_rows(y)
        )
    return states, cost.total


class _Trapezoid:
    """``int f dt`` by the trapezoidal rule, state by state."""

    def __init__(self, f: RunningCost | None, condition: Any, like: Tensor) -> None:
        self.f, self.condition, self.total = f, condition, like.new_zeros(like.shape[0])
        self.last: tuple[Tensor, Tensor] | None = None

    def add(self, x: States, t: Scalar) -> None:
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
    first: int,
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
        f"{what} is not finite{where} of scheme={scheme!r}, in {rows} row{'s' if rows != 1 else ''}{more}. Use more "
        "time steps, or check the drift, the diffusion and the control there.",
        what=what,
        step=step,
        rows=rows,
    )


def solve_adaptively(
    solver: Solver,
    equation: ControlledSDE,
    clock: Sequence[float],
    x: States,
    seed: int,
    tolerance: float,
    running_cost: RunningCost | None,
) -> tuple[list[States], PerPath]:
    """torchsde's adaptive stepping from each time of the grid to the next, relative and absolute error ``tolerance``.

    The noise is torchsde's ``BrownianInterval`` as a dyadic tree of this seed, so that another tolerance or grid sees
    the same Brownian path. The step is one for the whole batch (it is the root mean square of the errors that is
    controlled), so paths depend on the batch. Grid times are steps, never interpolated between steps.
    """
    import torchsde

    span = clock[-1] - clock[0]
    bm = torchsde.BrownianInterval(
        t0=clock[0],
        t1=clock[-1],
        size=(x.shape[0], equation.sde.control_shape.numel()),
        dtype=x.dtype,
        device=x.device,
        entropy=derive_seed(seed, Place.SOLVER_TREE) % 2**31,
        levy_area_approximation="space-time" if solver.area else "none",
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
            with global_rng(x.device, seed, Place.SOLVER_PROBE), warnings.catch_warnings():
                warnings.filterwarnings("error", message="Hitting minimum")
                ys, extra = torchsde.sdeint(  # pyright: ignore[reportAssignmentType]
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
                    extra_solver_state=extra  # pyright: ignore[reportArgumentType]
                    if solver.method == "reversible_heun"
                    else None,
                )  # type: ignore[misc]
        except AssertionError as error:
            raise NonFiniteError(
                f"state is not finite at step {k} of {len(clock) - 1} (t = {s:.4g}) of adaptive "
                f"scheme={solver.scheme!r}. Check the drift and the diffusion there.",
                what="state",
                step=k,
            ) from error
        except UserWarning as error:
            raise RuntimeError(
                f"tolerance={tolerance:g} asks for steps below 1e-6 of the horizon after t = {s:.4g} with "
                f"scheme={solver.scheme!r}; use a larger tolerance, or a fixed grid."
            ) from error
        y = ys[-1]
        states.append(equation.state(y))
        cost.add(states[-1], torch.tensor(t, dtype=torch.float64))
    _break_cycle(bm)
    if not bool(torch.isfinite(y).all()):
        raise explain(solver.scheme, equation, clock, states, running_cost, 0)
    return states, cost.total


def _break_cycle(bm: Any) -> None:
    """``BrownianInterval`` is a tree whose nodes know their parents: without this its noise would stay in memory until
    the next collection of cycles."""
    cache = getattr(bm, "_increment_and_space_time_levy_area_cache", None)
    if hasattr(cache, "clear"):
        cache.clear()  # type: ignore[union-attr]
    for name in ("_left_child", "_right_child", "_last_interval", "_top", "_w_h"):
        if hasattr(bm, name):
            setattr(bm, name, None)
