"""Chains of mixtures in many dimensions whose coordinates act on each other in pairs at most once they are turned.

The components' means differ in a few directions, and their covariances too; what these directions are coupled with is a
subspace W that the covariances and the reward map into itself. Outside of W all components are one Gaussian, which does
not say which of them a state comes from, so that the score falls apart into one on W and one that is linear. Where W is
a line or a plane, and covariance and reward have common axes in the rest, the chain falls apart into the coordinates
along these axes, on grids. Two or three components with one number as their variance in any dimension are such, with
any linear reward.
"""

from typing import Any

import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.shifts import ShiftFunction
from ..errors import NoExactSolution
from ..problems.problem import ControlProblem
from ..problems.rewards import Quadratic
from ..processes.generative import generative_sde
from ..processes.laws import Dirac, Gaussian, GaussianMixture
from ..shapes import Controls, PerPath, Scalar, States
from ..tensors import symmetric
from .base import ExactSolution
from .grid_chain import GridChainSolution
from .grids import GridLaw
from .mixtures import same_law
from .quadratic import quadratic_terms

_PLANE = 2  # dimensions of a grid, at most
_SMALL = 1e-10  # relative: what is none but for rounding


def axes_of(problem: ControlProblem) -> Tensor | None:
    """The axes along which a mixture's chain falls apart, columns of ``(d, d)``, those of W first; None where W has
    more than two dimensions, or covariance and reward no common axes outside of it, or the reward is not quadratic."""
    terms, reference = quadratic_terms(problem), problem.reference
    if terms is None or problem.running_cost_function is not None or reference.mixture is None:
        return None
    means, covariances = (v.detach().to("cpu", torch.float64) for v in _parts(reference.mixture))
    maps = [covariances[0], terms.reward.P]
    size = covariances.abs().max()
    plane = _span(((means - means[0]).mT, size.sqrt()), *((c - covariances[0], size) for c in covariances))
    while (wider := _span((plane, 1.0), *((m @ plane, m.norm()) for m in maps))).shape[1] > plane.shape[1]:
        plane = wider
    if plane.shape[1] > _PLANE:
        return None
    rest = torch.linalg.svd(plane).U[:, plane.shape[1] :]
    first, second = (inside / inside.norm().clamp(min=1e-300) for inside in (rest.mT @ m @ rest for m in maps))
    mixed = first + 0.6180339887 * second  # whose axes are those of both, if they have any in common
    rest = rest @ torch.linalg.eigh(symmetric(mixed)).eigenvectors
    for m in (rest.mT @ m @ rest for m in maps):
        if bool((m - m.diagonal().diag_embed()).abs().max() > _SMALL * m.abs().max()):
            return None
    return torch.cat((plane, rest), 1)


def _parts(mixture: GaussianMixture) -> tuple[Tensor, Tensor]:
    return mixture.means, mixture.covariances


def _span(*columns: tuple[Tensor, Any]) -> Tensor:
    """An orthonormal basis of what columns ``(d, n)`` span, each set of them with the size at which it counts."""
    scaled = torch.cat([c / c.norm() if c.norm() > _SMALL * size else torch.zeros_like(c) for c, size in columns], 1)
    U, s, _ = torch.linalg.svd(scaled, full_matrices=False)
    return U[:, s > _SMALL * s.max().clamp(min=1e-300)]


def _turned(problem: ControlProblem, axes: Tensor) -> ControlProblem:
    """The same problem in the coordinates along the axes, in float64."""
    reference: Any = problem.reference
    terms = quadratic_terms(problem)
    assert terms is not None
    mixture = reference.mixture.to(axes)
    there = GaussianMixture(mixture.weights, mixture.means @ axes, _blocks(axes.mT @ mixture.covariances @ axes))
    form, alpha = terms.reward.through(axes, torch.zeros_like(axes[0])), problem.alpha
    return ControlProblem(
        generative_sde(there, reference.schedule, noise_level=reference.noise_level),
        _start(problem, axes),
        Quadratic(_blocks(alpha * form.P), alpha * form.q, alpha * float(form.c)),
        alpha=alpha,
        start=problem.start,
    )


def _blocks(matrices: Tensor) -> Tensor:
    """Matrices without what rounding leaves in entries that are 0."""
    size = matrices.abs().amax((-1, -2), keepdim=True)
    return torch.where(matrices.abs() > _SMALL * size, matrices, 0.0)


def _start(problem: ControlProblem, axes: Tensor) -> Any:
    """The start along the axes; None, the reference's own, where it is that."""
    law: Any = problem.initial
    if same_law(law, problem.reference.own_initial):
        return None
    if isinstance(law, Dirac):
        return Dirac(law.mean.to(axes) @ axes)
    if isinstance(law, Gaussian):
        return Gaussian(law.mean.to(axes) @ axes, _blocks(axes.mT @ law.covariance_matrix.to(axes) @ axes))
    raise NoExactSolution(f"initial: no exact solution of a mixture's chain is known from a {type(law).__name__}.")


class TurnedSolution(ExactSolution):
    """A :class:`GridChainSolution` in the coordinates along other axes, of a chain that falls apart there.

    Attributes:
        axes: ``(d, d)``, their directions as columns.
        error: of the grids.
    """

    kind = "grids along turned axes"

    def __init__(self, problem: ControlProblem, chain: Chain, settings: dict[str, Any], axes: Tensor) -> None:
        super().__init__(problem, settings, chain)
        self.axes = axes
        there = _turned(problem, axes)
        times = [t for t in chain.clock if t >= 0]
        self._there = GridChainSolution(there, there.chain(times, chain.scheme), settings)
        self.error = self._there.error

    def _value_at(self, x: States, time: float) -> PerPath:
        return self._there._value_at(x @ self.axes, time)

    def _control_at(self, x: States, time: float) -> Controls:
        return self._there._control_at(x @ self.axes, time) @ self.axes.mT

    def _shift_function(self, chain: Chain) -> ShiftFunction:
        times = [self._snap(t) for t in chain.clock[:-1]]
        return lambda k, x, condition: chain.shift_at(
            k, x, self._control_at(x.to("cpu", torch.float64), times[k]).to(x)
        )

    @property
    def log_z(self) -> Scalar:
        return self._out(self._there.log_z)

    @property
    def start_log_z(self) -> Scalar:
        return self._out(self._there.start_log_z)

    @property
    def elbo(self) -> Scalar:
        return self._out(self._there.elbo)

    @property
    def floor(self) -> Scalar:
        return self._out(self._there.floor)

    def _kernel_at(self, x: Tensor, k: int) -> GridLaw:
        return self._there._kernel_at(x @ self.axes, k).along(self.axes, self._out(x[..., 0]))

    def marginal(self, t: float) -> Any:
        law = self._there.marginal(self._snap(float(t)))
        return law.along(self.axes, self._out(self.axes)) if isinstance(law, GridLaw) else self.problem.origin

    def bridge(self, s: float, t: float, x_t: Tensor) -> Gaussian:
        return self._there.bridge(s, t, x_t)
