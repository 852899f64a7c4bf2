"""``simulate``: paths of a problem's reference, or of any control."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.build import SAMPLING_SCHEMES
from ..chains.shifts import shift_function
from ..errors import check_name
from ..paths.chunks import check_chunk, integrate_in_chunks
from ..paths.integrator import KEEP, integrate
from ..paths.paths import Paths
from ..randomness import SeededNoise, SuppliedNoise, fresh_seed
from ..tensors import check_count, check_tensor
from .problem import ControlProblem
from .sampling import simulate_solver

__all__ = ["simulate", "simulate_chain"]


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
    state: Tensor | None = None,
    step: int = 0,
    condition: Tensor | None = None,
    tolerance: float | None = None,
    chunk: int | None = None,
) -> Paths:
    """Simulate ``num_paths`` paths of the problem's chain, or of a solver of higher order.

    Args:
        control: ``(x, t) -> (batch, *control_shape)`` with t ``(batch,)``; a solution's control; None for the reference.
        time_steps, scheme: as in ``solve``; default: those that the control was solved with, else 100 and "euler".
            ``scheme`` may also name one of torchsde's solvers, which have no likelihood ratios: "milstein" (strong order 1),
            "srk" (3/2), "heun", "midpoint", "euler-heun", "reversible-heun" (1; Stratonovich, with the correction of
            the drift); or "probability-flow", the ordinary differential equation of a generative reference.
        seed: None draws one from torch's global generator.
        keep: "all"; "states" (noise and shifts are drawn again when asked for); "end" (states too).
        noise: ``(K, num_paths, *noise_shape)`` standard normal numbers of your own, e.g. another run's ``paths.noises``
            for common random numbers; for "srk" a pair of these: for the increments, and for their space-time integrals.
        antithetic: paths 2i and 2i+1 get opposite noise.
        state, step: resume from states ``(num_paths, *event)`` at step ``step``; with the seed of an earlier run the noise
            is that run's, so that the paths continue it.
        condition: ``(num_paths, ...)`` conditions; default: drawn from the problem's.
        tolerance: adaptive steps between the grid's times with this relative and absolute error: torchsde's (step sizes
            then depend on the whole batch, and the noise is a Brownian tree of its own), or torchdiffeq's "dopri5" for the
            probability flow. None: one step per step of the grid.
        chunk: with ``keep="end"``, simulate so many paths at a time (a multiple of 64): memory no longer grows with
            ``num_paths`` beyond what is returned. The noise of a path does not depend on it.

    Returns:
        :class:`Paths`; for a solver :class:`SolvedPaths`, whose running cost is by the trapezoidal rule, and whose
        ``log_ratio``, ``kl``, ``noises`` and ``shifts`` raise :class:`NoLikelihood`.
    """
    check_count("num_paths", num_paths)
    if time_steps is None and scheme is None and (settings := getattr(control, "settings", None)):
        time_steps, scheme = settings.get("time_steps"), settings.get("scheme")
    if scheme in SAMPLING_SCHEMES:
        if chunk is not None:
            raise ValueError(f"chunk: scheme={scheme!r} runs all its paths at once; call it once per chunk of paths.")
        if time_steps is None:
            time_steps = (getattr(control, "settings", None) or {}).get("time_steps")
        chain, seed = problem.chain(time_steps, "euler"), fresh_seed(seed)
        return simulate_solver(
            problem,
            chain,
            scheme,
            control,
            seed,
            start_of(problem, chain, num_paths, control, seed, keep, state, step, condition),
            keep=keep,
            noise=noise,
            antithetic=antithetic,
            step=step,
            resumed=state is not None,
            tolerance=tolerance,
        )
    if tolerance is not None:
        raise ValueError(
            f"tolerance: scheme={scheme or 'euler'!r} has fixed steps; use more time_steps, or an adaptive scheme such as "
            "'srk' or 'heun'."
        )
    chain = problem.chain(time_steps, scheme)
    return simulate_chain(
        problem,
        chain,
        num_paths,
        control,
        seed=seed,
        keep=keep,
        noise=noise,
        antithetic=antithetic,
        state=state,
        step=step,
        condition=condition,
        chunk=chunk,
    )


def simulate_chain(
    problem: ControlProblem,
    chain: Chain,
    num_paths: int,
    control: Any = None,
    *,
    seed: int | None = None,
    keep: str = "all",
    noise: Tensor | None = None,
    antithetic: bool = False,
    state: Tensor | None = None,
    step: int = 0,
    condition: Tensor | None = None,
    grad: bool = False,
    chunk: int | None = None,
) -> Paths:
    """:func:`simulate` on a chain that is already made; with ``grad`` the graph is kept."""
    if chunk is not None:
        check_chunk(chunk, keep)
    seed = fresh_seed(seed)
    state, condition = start_of(problem, chain, num_paths, control, seed, keep, state, step, condition)
    if noise is not None:
        check_tensor("noise", noise, shape=(chain.steps, num_paths, *chain.noise_shape))
        if antithetic:
            raise ValueError("antithetic does not go with supplied noise; negate half of the noise yourself.")
        source: Any = SuppliedNoise(noise)
    else:
        source = SeededNoise(
            seed,
            num_paths,
            chain.steps,
            chain.noise_shape,
            dtype=chain.times.dtype,
            device=chain.times.device,
            antithetic=antithetic,
        )

    def run(keep: str) -> Paths:
        shift = None if control is None else shift_function(chain, control)
        with torch.set_grad_enabled(grad), problem.evaluating():
            if chunk is not None and keep == "end":
                return integrate_in_chunks(
                    chain,
                    state,
                    source,
                    shift,
                    chunk,
                    condition=condition,
                    running_cost=problem.running_cost_or_none,
                    first=step,
                    replay=lambda: run("all"),
                )
            return integrate(
                chain,
                state,
                source,
                shift,
                condition=condition,
                running_cost=problem.running_cost_or_none,
                keep=keep,
                first=step,
                replay=(lambda: run("all")) if keep != "all" else None,
            )

    return run(keep)


def start_of(
    problem: ControlProblem,
    chain: Chain,
    num_paths: int,
    control: Any,
    seed: int,
    keep: str,
    state: Tensor | None,
    step: int,
    condition: Tensor | None,
) -> tuple[Tensor, Any]:
    """The states and conditions to begin with, and checks of the arguments that every simulation shares."""
    check_name("keep", keep, KEEP)
    if control is not None and not callable(control):
        raise TypeError(
            f"control must be callable (x, t) -> u, or None for the reference; got {type(control).__name__}."
        )
    if not 0 <= step < chain.steps:
        raise ValueError(f"step must be from 0 to {chain.steps - 1}, got {step}.")
    if step and state is None:
        raise ValueError("step without state: pass the states to resume from as state=paths.states[step].")
    if state is None:
        state = problem.draw_start(num_paths, seed)
    else:
        check_tensor("state", state, shape=(num_paths, *chain.event_shape))
    if condition is None:
        condition = problem.draw_condition(num_paths, seed)
    elif problem.condition is None:
        raise ValueError("condition given, but the problem has none; make it with ControlProblem(..., condition=...).")
    elif condition.shape[0] != num_paths:
        raise ValueError(f"condition must have {num_paths} rows, one per path; got {tuple(condition.shape)}.")
    return state, condition
