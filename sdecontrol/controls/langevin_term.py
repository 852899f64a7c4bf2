"""The Langevin term of the default network: ``sigma^T grad r / alpha``, as the network asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..paths.paths import Paths
from ..problems.gibbs import GibbsProblem
from ..problems.problem import ControlProblem
from ..problems.rewards import Linear, Quadratic
from ..processes.annealed import AnnealedLangevin
from ..processes.generative import GenerativeSDE
from ..processes.sde import SDE
from ..processes.time_changed import TimeChanged

_SLOPE_TIMES, _SLOPE_PATHS = 8, 32  # at which the reward's slope is measured
_STEEP = 50.0  # of that slope: Adam's steps of 5e-3 then move the control by a quarter


@dataclass(frozen=True)
class LangevinTerm:
    """What the network's Langevin coefficients multiply.

    Attributes:
        gradient: ``(x, y, create_graph) -> sigma-free grad r / alpha`` of x's shape.
        sde: whose diffusion it uses; None: the term is not used along paths.
        fade: a function of time by which it is multiplied, 1 at the end: of a reward much rougher than its value is
            before it.
        affine: ``P (m, n), p (m,)`` where ``sigma^T grad r / alpha = P x + p`` at all times: the term then costs
            nothing, since it is folded into the affine path.
        level: times ``(K,)`` -> ``(K,)``, by which that is multiplied where sigma is a number that changes with time;
            None: 1.
    """

    gradient: Callable[[Tensor, Any, bool], Tensor]
    sde: SDE | None = None
    fade: Callable[[float], float] | None = None
    affine: tuple[Tensor, Tensor] | None = None
    level: Callable[[Tensor], Tensor] | None = None

    def __deepcopy__(self, memo: Any) -> LangevinTerm:
        return self  # a definition: a copied control has the same

    @classmethod
    def of(cls, problem: ControlProblem) -> LangevinTerm:
        """Of a problem whose reward has a gradient."""
        gradient, fade = partial(_reward_gradient, problem), None
        if isinstance(problem, GibbsProblem):
            gradient, fade = _damped(problem, gradient)
        sde = problem.reference
        level = sde.levels if isinstance(sde, GenerativeSDE) else None
        return cls(gradient, sde if isinstance(sde, SDE) else None, fade, _affine_term(problem), level)


def _slope(problem: ControlProblem, x: Tensor, y: Any, create_graph: bool) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = x if create_graph else x.detach().requires_grad_(True)
        value = problem._call_reward(leaf, y)
        slope = torch.autograd.grad(value.sum(), leaf, create_graph=create_graph)[0]
    return (value if create_graph else value.detach()) / problem.alpha, slope / problem.alpha


def reward_and_slope(problem: ControlProblem, x: Tensor, y: Any, create_graph: bool) -> tuple[Tensor, Tensor]:
    """``r/alpha`` ``(batch,)`` and ``grad r / alpha`` of x's shape; both 0 where one of them is not finite."""
    # before its end a path may be where the reward is not finite (a logarithm): there both are 0
    value, slope = _slope(problem, x, y, create_graph)
    if bool(torch.isfinite(value.detach().sum() + slope.detach().sum())):
        return value, slope
    rows = (torch.isfinite(slope.detach()).flatten(1).all(1) & torch.isfinite(value.detach())).nonzero().flatten()
    values, slopes = torch.zeros_like(value), torch.zeros_like(x)
    if len(rows) == 0:
        return values, slopes
    value, slope = _slope(problem, x[rows], None if y is None else y[rows], create_graph)
    return values.index_copy(0, rows, value), slopes.index_copy(0, rows, slope)


def _reward_gradient(problem: ControlProblem, x: Tensor, y: Any, create_graph: bool) -> Tensor:
    """``grad r / alpha``; 0 where it is not finite."""
    return reward_and_slope(problem, x, y, create_graph)[1]


def langevin_scale(problem: ControlProblem, pilot: Paths) -> float:
    """1 over how many times the reward's usual slope, ``|grad r| / alpha`` on the reference's paths, exceeds
    ``_STEEP``; 1 where it does not.

    A step of Adam changes the coefficients by the learning rate, and the control by that times the slope: where that is
    hundreds, paths are thrown to where it is thousands, and training diverges within a few steps. What the term can
    represent stays the same.
    """
    steps = sorted({round(i * (len(pilot.states) - 1) / (_SLOPE_TIMES - 1)) for i in range(_SLOPE_TIMES)})
    rows = slice(0, _SLOPE_PATHS)
    x = pilot.states[steps, rows].flatten(0, 1)
    y = (
        None
        if pilot.condition is None
        else pilot.condition[rows].repeat(len(steps), *(1,) * (pilot.condition.ndim - 1))
    )
    slope = float(_reward_gradient(problem, x, y, False).flatten(1).norm(dim=1).median())
    return min(1.0, _STEEP / max(slope, 1e-300))


def _damped(problem: GibbsProblem, gradient: Any) -> tuple[Any, Callable[[float], float]]:
    """The Langevin term of a Gibbs problem: its reward's gradient, softly bounded at five times its usual size, and how
    it fades before the end.

    Far from the end the value is smoother than the density by the noise that is left: ``rho^2`` of a Gaussian's
    curvature becomes ``rho^2/(1 + left rho^2)``. Without this one step of Adam on the coefficients can throw paths out
    of the region where the density is a number.
    """
    rough, reference = problem.roughness, problem.reference
    if isinstance(reference, AnnealedLangevin):
        return partial(_remembered, reference), reference.beta
    bound = 5 * rough * problem.dim**0.5
    return partial(_bounded, gradient, problem.scale, bound), partial(_faded, reference, rough)


def _remembered(reference: AnnealedLangevin, x: Tensor, y: Any, create_graph: bool) -> Tensor:
    """The reward's gradient of annealed Langevin, which bounds the score itself, and has it at hand."""
    return reference.score(x, y) + (x - reference.centre) / reference.scale.square()


def _bounded(gradient: Any, scale: Tensor, bound: float, x: Tensor, y: Any, create_graph: bool) -> Tensor:
    z = scale * gradient(x, y, create_graph)
    return z / (1 + z.norm(dim=1, keepdim=True) / bound) / scale


def _faded(reference: TimeChanged, rough: float, t: float) -> float:
    return 1 / (1 + max(0.0, float(reference.left(t))) * rough**2)


def _affine_term(problem: ControlProblem) -> tuple[Tensor, Tensor] | None:
    """``P, p`` with ``sigma^T grad r / alpha = P x + p``, where the reward is quadratic or linear and sigma
    constant; with ``sigma = level(t)`` of a generative SDE, without the level."""
    reward, sde = problem.reward_function, problem.reference
    sigma = sde.constant_diffusion if isinstance(sde, SDE) else None
    if isinstance(sde, GenerativeSDE):
        sigma = torch.ones(())
    if sigma is None or sde.tangential or len(problem.event_shape) != 1 or type(reward) not in (Quadratic, Linear):
        return None
    assert isinstance(reward, (Quadratic, Linear))
    n = problem.event_shape[0]
    sigma = sigma.to(reward.g)
    root = sigma[0] if sigma.ndim == 3 else torch.diag_embed(sigma.expand(n))
    slope = -reward.G if isinstance(reward, Quadratic) else torch.zeros_like(root[:, :1]).expand(n, n)
    return root.mT @ slope / problem.alpha, root.mT @ reward.g / problem.alpha
