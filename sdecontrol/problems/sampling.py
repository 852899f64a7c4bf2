"""Problems through solvers without likelihoods: torchsde's, the probability flow, and its likelihoods."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.shifts import shift_function
from ..errors import NonFiniteError
from ..paths.brownian import GridBrownian
from ..paths.equations import ControlledSDE, noise_kind
from ..paths.flow import LogLikelihood, flow_log_likelihood, require_generative, solve_flow
from ..paths.integrator import integrate
from ..paths.paths import Record, Totals
from ..paths.solvers import SolvedPaths, check_solver, solve_adaptively, solve_on_grid
from ..precision import full_precision
from ..processes.generative import GenerativeSDE
from ..processes.laws import draw
from ..processes.modules import evaluating, modules_in
from ..processes.sde import SDE
from ..randomness import Place, derive_seed
from ..shapes import States
from ..tensors import check_tolerance
from .problem import ControlProblem
from .simulation_options import SimulationOptions


@full_precision()
def simulate_solver(
    problem: ControlProblem, chain: Chain, scheme: str, num_paths: int, control: Any, seed: int, how: SimulationOptions
) -> SolvedPaths:
    """:func:`simulate` with a scheme that is no chain; ``chain`` is the Euler chain of the same grid."""
    step, resumed, tolerance = how.step, how.state is not None, how.tolerance
    tolerance = None if tolerance is None else check_tolerance(tolerance, problem.dtype)
    if (tolerance is not None or scheme == "probability-flow") and (how.noise is not None or how.antithetic or resumed):
        why = "adaptive steps" if scheme != "probability-flow" else "scheme='probability-flow'"
        raise ValueError(f"noise, antithetic, state and step do not go with {why}.")
    if resumed and step and scheme == "reversible-heun":
        raise ValueError("step: reversible-heun carries more than the state from step to step and cannot be resumed.")
    if problem.stop is not None:
        raise ValueError(f"stop: scheme={scheme!r} does not stop its paths; leave scheme out.")
    x, condition = how.begin(problem, chain, num_paths, control, seed)
    if scheme == "probability-flow":
        return _flow(problem, chain, control, seed, (x, condition), how.keep, tolerance)
    sde = problem.reference
    if not isinstance(sde, SDE) or sde.tangential:
        raise ValueError(
            f"scheme={scheme!r} is a solver of stochastic differential equations on R^d, and the reference is a "
            f"{type(sde).__name__}. Leave scheme out."
        )
    kind = noise_kind(sde, x, chain.times[-1] * 0.5)
    solver = check_solver(scheme, kind, tolerance is not None)
    noises, *areas = how.sources(chain, num_paths, seed, 2 if solver.area else 1)
    equation = ControlledSDE(
        sde,
        kind,
        control,
        condition,
        stratonovich=not solver.ito,
        diagonal=tolerance is not None or scheme == "reversible-heun",
    )

    def run(keep_states: bool) -> SolvedPaths:
        with torch.no_grad(), problem.evaluating(), evaluating(modules_in(control)):
            states = [x]
            if step < chain.start:  # the learned start is run as the chain it is
                shift = None if control is None else shift_function(chain, control)
                before: dict[str, Any] = {"condition": condition, "steps": range(step, chain.start)}
                states = list(integrate(chain, x, noises, shift, keep="states", **before).states)
            first, clock = max(step - chain.start, 0), chain.clock[chain.start :]
            cost = problem.running_cost_or_none
            if tolerance is not None:
                main, total = solve_adaptively(solver, equation, clock, states[-1], seed, tolerance, cost)
            else:
                width, area = sde.control_shape.numel(), areas[0] if areas else None
                bm = GridBrownian(clock, noises, x.shape[0], width, x, area=area, offset=chain.start)
                main, total = solve_on_grid(solver, equation, clock, states[-1], bm, cost, keep_states, first)
        record = Record([*states[:-1], *main] if keep_states else None)
        again = partial(simulate_solver, problem, chain, scheme, num_paths, control, seed)
        replay = None if keep_states else partial(again, replace(how, keep="states"))
        return SolvedPaths(
            chain, step, chain.steps, main[-1], condition, Totals(total), record, replay, problem, scheme=scheme
        )

    try:
        return run(how.keep != "end")
    except NonFiniteError as error:
        if error.step is None:
            run(True)  # the same paths with their states kept: names the step
        raise


def _flow(
    problem: ControlProblem,
    chain: Chain,
    control: Any,
    seed: int,
    start: tuple[Tensor, Any],
    keep: str,
    tolerance: float | None,
) -> SolvedPaths:
    sde = require_generative(problem.reference, "scheme='probability-flow'")
    if control is not None:
        raise ValueError(
            "control: the probability flow is of the model alone (a control has no score). For a tuned model make a "
            "problem of it: sc.ControlProblem(sc.generative_sde(solution.model, ...)), or use another scheme."
        )
    x, condition = start
    if problem.start == "controlled":  # the learned start is there for the control; the flow starts from the law itself
        x = draw(problem.initial, len(x), derive_seed(seed, Place.FLOW_START))
    main = chain.main
    cost = x.new_zeros(x.shape[0])
    with torch.no_grad(), problem.evaluating():
        states = solve_flow(sde, main.clock, x, condition, tolerance)
        if (f := problem.running_cost_or_none) is not None:
            here = [f(s, t, condition) for s, t in zip(states, main.times)]
            for (a, b), h in zip(pairwise(here), main.step_sizes):
                cost = cost + 0.5 * h * (a + b)
    record = Record(None if keep == "end" else states)
    replay = partial(_flow, problem, chain, control, seed, start, "all", tolerance)
    return SolvedPaths(
        main, 0, main.steps, states[-1], condition, Totals(cost), record, replay, problem, scheme="probability-flow"
    )


@full_precision()
def log_likelihood(
    model: GenerativeSDE | ControlProblem,
    x: States,
    *,
    condition: Tensor | None = None,
    divergence: str | None = None,
    probes: int = 16,
    tolerance: float | None = None,
    seed: int | None = None,
) -> LogLikelihood:
    """Log-density of a generative model's samples, by its probability flow and the instantaneous change of variables
    (Song et al. 2011.13456, eq. 39).

    It is the density of what the flow makes of the start's law; of the model's marginals, as far as its score is that
    of a diffusion. For a tuned model pass ``sc.generative_sde(solution.model, ...)``.

    Args:
        model: a ``generative_sde(...)``, or a problem with one (whose ``initial`` is then the start's law).
        x: states at the end (data), at least one.
        condition: ``(n, ...)`` for a conditional model.
        divergence: "exact" (a product with the Jacobian per dimension), "hutchinson" (random, unbiased, with its
            standard error); None: exact up to 32 dimensions.
        probes: number of random directions for "hutchinson".
        tolerance: relative and absolute error of torchdiffeq's dopri5; default 1e-7 (1e-5 in float32).
        seed: of the directions; None draws one from torch's global generator.

    Returns:
        :class:`LogLikelihood`: ``value``, ``stderr`` (0 where exact), ``latent``.

    Raises:
        TypeError: not a generative model. NonFiniteError: the flow or the density is not finite.
    """
    problem = model if isinstance(model, ControlProblem) else None
    sde = require_generative(model if problem is None else problem.reference, "log_likelihood")
    start = sde.own_initial if problem is None else problem.initial
    options: dict[str, Any] = {"divergence": divergence, "probes": probes, "tolerance": tolerance, "seed": seed}
    with sde.evaluating() if problem is None else problem.evaluating():
        return flow_log_likelihood(sde, start, x, condition=condition, **options)
