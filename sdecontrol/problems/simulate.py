"""``simulate``: paths of a problem's reference, or of any control."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.build import SAMPLING_SCHEMES
from ..chains.shifts import shift_function
from ..counting import counted_control
from ..paths.chunks import check_chunk, integrate_in_chunks
from ..paths.integrator import NoiseSource, check_likelihood, integrate
from ..paths.paths import Paths
from ..precision import full_precision
from ..processes.modules import evaluating, modules_in, out_of_inference_mode
from ..randomness import fresh_seed
from ..shapes import States
from ..tensors import check_count
from .problem import ControlProblem
from .sampling import simulate_solver
from .simulation_options import SimulationOptions


@full_precision()
def simulate(
    problem: ControlProblem,
    num_paths: int,
    control: Any = None,
    time_steps: Any = None,
    scheme: str | None = None,
    seed: int | None = None,
    keep: str = "all",
    noise: Any = None,
    antithetic: bool = False,
    state: States | None = None,
    step: int = 0,
    condition: Tensor | None = None,
    tolerance: float | None = None,
    chunk: int | None = None,
) -> Paths:
    """Simulate ``num_paths`` paths of the problem's chain, or of a solver of higher order.

    Args:
        control: ``(x, t) -> (batch, *control_shape)`` with t ``(batch,)``; a solution's control; None for the
            reference.
        time_steps, scheme: as in ``solve``; default: those that the control was solved with, else 100 and the
            reference's own.
            ``scheme`` may also name one of torchsde's solvers, which have no likelihood ratios: "milstein" (strong
            order 1), "srk" (3/2), "heun", "midpoint", "euler-heun", "reversible-heun" (1; Stratonovich, with the
            correction of the drift); or "probability-flow", the ordinary differential equation of a generative
            reference.
        seed: None draws one from torch's global generator.
        keep: "all"; "states" (noise and shifts are drawn again when asked for); "end" (states too).
        noise: ``(K, num_paths, *noise_shape)`` standard normal numbers of your own, e.g. another run's ``paths.noises``
            for common random numbers; for "srk" a pair of these: for the increments, and for their space-time
            integrals.
        antithetic: paths 2i and 2i+1 get opposite noise.
        state, step: resume from states at step ``step``; with the seed of an earlier run the
            noise is that run's, so that the paths continue it.
        condition: ``(num_paths, ...)`` conditions; default: drawn from the problem's.
        tolerance: adaptive steps between the grid's times with this relative and absolute error: torchsde's (step sizes
            then depend on the whole batch, and the noise is a Brownian tree of its own), or torchdiffeq's "dopri5" for
            the
            probability flow. None: one step per step of the grid.
        chunk: with ``keep="end"``, simulate so many paths at a time (a multiple of 64): memory no longer grows with
            ``num_paths`` beyond what is returned. The noise of a path does not depend on it.

    Returns:
        :class:`Paths`; for a solver :class:`SolvedPaths`, whose running cost is by the trapezoidal rule, and whose
        ``log_ratio``, ``kl``, ``noises`` and ``shifts`` raise :class:`NoLikelihood`.
    """
    check_count("num_paths", num_paths)
    settings = getattr(control, "settings", None) or {}
    if time_steps is None and (scheme is None or scheme in SAMPLING_SCHEMES):
        time_steps, scheme = settings.get("time_steps"), scheme or settings.get("scheme")
    how = SimulationOptions(keep, condition, noise, antithetic, state, step, tolerance, chunk)
    if scheme in SAMPLING_SCHEMES:
        if chunk is not None:
            raise ValueError(f"chunk: scheme={scheme!r} runs all its paths at once; call it once per chunk of paths.")
        chain = problem.chain(time_steps, "euler")
        return simulate_solver(problem, chain, scheme, num_paths, control, fresh_seed(seed), how)
    if tolerance is not None:
        raise ValueError(
            f"tolerance: scheme={scheme or 'euler'!r} has fixed steps; use more time_steps, or an adaptive scheme such "
            "as 'srk' or 'heun'."
        )
    chain = problem.chain(time_steps, scheme)
    return simulate_chain(problem, chain, num_paths, control, seed=seed, keep=keep, condition=condition, how=how)


@full_precision()
def simulate_chain(
    problem: ControlProblem,
    chain: Chain,
    num_paths: int,
    control: Any = None,
    *,
    seed: int | None = None,
    keep: str = "all",
    condition: Tensor | None = None,
    how: SimulationOptions | None = None,
) -> Paths:
    """:func:`simulate` on a chain that is already made, without a graph; ``how`` says the rest, where there is more
    to say."""
    how, seed = replace(how or SimulationOptions(), keep=keep, condition=condition), fresh_seed(seed)
    with out_of_inference_mode():
        return _simulate(problem, chain, num_paths, control, seed, how)


def _simulate(
    problem: ControlProblem, chain: Chain, num_paths: int, control: Any, seed: int, how: SimulationOptions
) -> Paths:
    keep = how.keep
    if how.chunk is not None:
        check_chunk(how.chunk, keep)
    state, condition = how.begin(problem, chain, num_paths, control, seed)
    (source,) = how.sources(chain, num_paths, seed)
    options: dict[str, Any] = {"condition": condition, "running_cost": problem.running_cost_or_none}
    options["steps"] = range(how.step, chain.steps)

    return _run(problem, chain, control, (state, source), how, options, keep)


def _run(
    problem: ControlProblem,
    chain: Chain,
    control: Any,
    begun: tuple[Tensor, NoiseSource],
    how: SimulationOptions,
    options: dict[str, Any],
    keep: str,
) -> Paths:
    """The paths from given states and noise; what they did not keep they draw again by the same call."""
    drawing = None
    if keep == "end" and not how.weigh and hasattr(control, "drawing_on"):
        drawing = control.drawing_on(chain)
        drawing = drawing and counted_control(control, drawing, lambda k, x, y: len(x))
    shift = None if control is None else drawing or shift_function(chain, control)
    with torch.no_grad(), problem.evaluating(), evaluating(modules_in(control)):
        if keep == "end":
            paths = integrate_in_chunks(chain, *begun, shift, how.chunk, **options)  # type: ignore[arg-type]
        else:
            paths = integrate(chain, *begun, shift, keep=keep, **options)
    if drawing is not None:  # which says nothing of them
        paths.totals.log_ratio = paths.totals.kl = None
    if keep != "all":
        paths.replay = partial(_run, problem, chain, control, begun, how, options, "all")
    return paths.towards(problem)


@torch.no_grad()
@full_precision()
def roll_out(
    problem: ControlProblem,
    chain: Chain,
    control: Any,
    x0: States,
    noise: NoiseSource,
    condition: Any = None,
    until: int | None = None,
) -> Paths:
    """Paths to learn from: all of them kept, without a graph, towards the problem's target.

    Args:
        control: None for the reference.
        until: follow the control for so many steps only, then the reference; None: to the end.
    """
    shift = None if control is None else shift_function(chain, control)
    if shift is not None and until is not None:
        own, nothing = shift, chain.times.new_zeros(1, *chain.noise_shape)
        shift = lambda k, x, y: own(k, x, y) if k < until else nothing.expand(len(x), *chain.noise_shape)  # noqa: E731
    f = problem.running_cost_or_none
    paths = integrate(chain, x0, noise, shift, condition=condition, running_cost=f)
    check_likelihood(paths.kl(), chain)
    return paths.towards(problem)
