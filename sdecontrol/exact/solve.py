"""``exact_solution``: the closed form of a control problem, where one is known."""

from numbers import Integral
from typing import Any

import torch

from ..chains.base import Chain
from ..errors import NoExactSolution
from ..precision import full_precision
from ..problems.problem import DEFAULT_TIME_STEPS, ControlProblem, check_problem
from ..processes.sde import SDE
from .base import ExactSolution
from .discrete import ChainSolution
from .finite import FiniteChainSolution, FiniteSolution
from .finite_process import FiniteProcessSolution
from .grid_chain import GridChainSolution
from .grid_process import GridSolution
from .manifolds import ManifoldSolution
from .mixtures import MixtureSolution
from .quadratic import quadratic_terms
from .riccati import RiccatiSolution
from .stopped import StoppedChainSolution
from .stopped_plane import StoppedPlaneSolution
from .stopping import StoppedSolution
from .turned import TurnedSolution, axes_of

_FEW = 1024  # states, with which a solution costs as little as a closed form


@full_precision()
def exact_solution(
    problem: ControlProblem,
    time_steps: Any = None,
    *,
    like: Any = None,
    scheme: str | None = None,
    grids: bool = True,
) -> ExactSolution:
    """The exact solution of a problem, in continuous time or of its discretised chain.

    Known are linear-quadratic problems (a linear reference, reward ``Quadratic``, ``Linear`` or None, running cost
    ``QuadraticCost`` or None, Dirac or Gaussian start), in continuous time and on chains; Gaussian-mixture models with
    a linear or quadratic reward, in continuous time; everything with finitely many states (a :class:`JumpProcess` in
    continuous time and on chains; chains on tokens of up to 5e7 transitions a step); and, on grids, any problem that
    falls apart into coordinates, or pairs of them (on chains with noise that does not depend on the state), that do not
    act on each other, those of pre-trained models that compute in float64 among them, and chains of mixtures in any
    dimension that do so along turned axes (two or three components of one variance, with a linear reward, are such);
    and, as series, any reward on the sphere S^2 without drift and on tori of one or two angles (``ManifoldSDE``). For
    that nothing is declared: drift, diffusion, reward and running cost are probed. Grid solutions say how exact they
    are (``error``).

    Args:
        time_steps: number of steps or grid of times of the chain; None for continuous time.
        like: a solution, whose chain is meant (its ``settings``: "time_steps" and "scheme").
        scheme: "euler" or "exact", with time_steps; default: the problem's own.
        grids: False for closed forms only: a grid takes seconds (chains whose noise depends on the state, and pairs, up
            to a minute), and so may more than 1024 states.

    Raises:
        NoExactSolution: naming what is missing.
    """
    check_problem(problem)
    discrete, time_steps, scheme = _discretisation(time_steps, like, scheme)
    if problem.condition is not None:
        raise NoExactSolution(
            "condition: no exact solution is known for conditional problems; make one problem per condition."
        )
    if problem.reference.reverse_target:
        raise NoExactSolution(
            "reference: an annealed Langevin target is made of backward kernels; it has no value function, and no "
            "exact solution is known. Use reference='ou' or 'brownian'."
        )
    reference = problem.reference
    if reference.state_dtype is not None:
        return _finite(problem, discrete, time_steps, scheme, grids)
    if reference.tangential:
        if problem.stop is not None:
            raise NoExactSolution("stop: no exact solution is known on a manifold with a region to stop in.")
        if not grids and not (reference.still and problem.running_cost_function is None):
            raise NoExactSolution("grids: with a drift or a running cost a series on a manifold is made step by step.")
        chain = problem.chain(time_steps, scheme) if discrete else None
        return ManifoldSolution(problem, {} if chain is None else _settings(chain, time_steps), chain)
    if problem.stop is not None or problem.vanishes:
        return _stopped(problem, discrete, time_steps, scheme, grids)
    if not isinstance(reference, SDE):
        raise NoExactSolution(f"reference: no exact solution is known for a {type(reference).__name__}.")
    linear = reference.as_linear()
    if reference.mixture is not None and linear is None and not discrete:
        return MixtureSolution(problem)
    terms = None if linear is None else quadratic_terms(problem)
    if terms is None:
        _check_grids(problem, grids)
    if not discrete:
        return GridSolution(problem) if terms is None or linear is None else RiccatiSolution(problem, linear, terms)
    chain = problem.chain(time_steps, scheme)
    settings = _settings(chain, time_steps)
    if terms is None:
        return _on_grids(problem, chain, settings)
    return ChainSolution(problem, chain, settings, terms)


def _on_grids(problem: ControlProblem, chain: Chain, settings: dict[str, Any]) -> ExactSolution:
    """In the state's own coordinates, or along other axes in which a mixture's chain falls apart."""
    try:
        return GridChainSolution(problem, chain, settings)
    except NoExactSolution:
        axes = axes_of(problem)
        if axes is None or len(axes) <= 2:
            raise
        return TurnedSolution(problem, chain, settings, axes)


def _settings(chain: Chain, time_steps: Any) -> dict[str, Any]:
    """By which ``like=`` and ``simulate`` know the chain of a process in continuous time."""
    steps: Any = DEFAULT_TIME_STEPS if time_steps is None else time_steps
    steps = int(steps) if isinstance(steps, Integral) else [float(t) for t in steps]
    return {"time_steps": steps, "scheme": chain.scheme}


def _stopped(
    problem: ControlProblem, discrete: bool, time_steps: Any, scheme: str | None, grids: bool
) -> StoppedSolution:
    """Of a chain that stops, or whose reward is -inf somewhere."""
    what = "stop" if problem.stop is not None else "reward"
    if not grids:
        raise NoExactSolution(f"{what}: no closed form is known where a process stops or a reward is -inf.")
    if not discrete:
        raise NoExactSolution(
            f"{what}: where a process stops or a reward is -inf, the solution of a chain is known: pass time_steps. "
            "(With sc.Region(..., boundary_correction=True) hitting is that of continuous time up to o(sqrt(h)).)"
        )
    if not (problem.reference.gaussian and problem.reference.continuous):
        raise NoExactSolution(f"reference: no exact solution is known for a {type(problem.reference).__name__}.")
    chain = problem.chain(time_steps, scheme)
    sizes = {1: StoppedChainSolution, 2: StoppedPlaneSolution}
    size = problem.event_shape.numel()
    if size not in sizes or len(problem.event_shape) != 1:
        raise NoExactSolution(
            f"{what}: where a process stops or a reward is -inf, chains of one or two coordinates are solved, and this "
            f"one has states of shape {tuple(problem.event_shape)}; estimate (sc.SMC, sc.TemperedSMC)."
        )
    return sizes[size](problem, chain, _settings(chain, time_steps))


def _finite(
    problem: ControlProblem, discrete: bool, time_steps: Any, scheme: str | None, grids: bool
) -> FiniteSolution:
    """Of tokens: of a jump process, or of a chain between finitely many states."""
    if not grids and problem.reference.space.size > _FEW:
        raise NoExactSolution("grids: the solution of so many states is none of those that cost next to nothing.")
    if not problem.reference.continuous:
        chain: Any = problem.chain(time_steps, scheme)
        return FiniteChainSolution(problem, chain, {"time_steps": None, "scheme": None})
    if not discrete:
        return FiniteProcessSolution(problem)
    chain = problem.chain(time_steps, scheme)
    return FiniteChainSolution(problem, chain, _settings(chain, time_steps))


def _check_grids(problem: ControlProblem, grids: bool) -> None:
    """Raise unless grids may be used, states are vectors, and a pre-trained model computes in float64, as grids do."""
    if not grids:
        raise NoExactSolution("grids: no closed form is known for this problem.")
    if len(problem.event_shape) != 1:
        raise NoExactSolution(
            f"reference: no exact solution is known for a nonlinear {type(problem.reference).__name__} with states of "
            f"shape {tuple(problem.event_shape)}; grids need vector states."
        )
    if not problem.reference.pretrained:
        return
    x = problem.draw_start(2, 0).double()
    try:
        with torch.no_grad():
            made = problem.reference.drift(x, torch.tensor(0.5 * problem.horizon, dtype=x.dtype))  # type: ignore[union-attr]
    except RuntimeError as error:
        raise NoExactSolution(
            "reference: grids need a pre-trained model that computes in float64, and this one does not; pass "
            f"model.double(), or a sc.GaussianMixture in the model's place. ({error})"
        ) from error
    if made.dtype != torch.float64:
        raise NoExactSolution(
            f"reference: grids need a pre-trained model that computes in float64, and this one gives {made.dtype}; do "
            "not convert in it."
        )


def _discretisation(time_steps: Any, like: Any, scheme: str | None) -> tuple[bool, Any, str | None]:
    """Whether a chain is meant, and which."""
    if like is not None:
        if time_steps is not None or scheme is not None:
            raise TypeError("give time_steps (and scheme), or like=solution, not both.")
        settings = getattr(like, "settings", None)
        if not isinstance(settings, dict):
            raise TypeError(f"like must be a solution (with settings), got {type(like).__name__}.")
        return bool(settings), settings.get("time_steps"), settings.get("scheme")
    if time_steps is None and scheme is not None:
        raise TypeError(f"scheme={scheme!r} without time_steps: continuous time has no scheme; pass time_steps too.")
    return time_steps is not None, time_steps, scheme
