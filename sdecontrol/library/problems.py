"""Named control problems: fixed, versioned definitions with their usual discretisation.

The card is that of Domingo-Enrich et al. 2312.02027 and of its published settings:
``dX = (b + sigma u) dt + sigma dW``, cost ``E[int (|u|^2/2 + f) dt + g(X_T)]``, T = 1, one fixed start; in the convention of
this package alpha = 1, the reward is ``-g`` and f is the running cost. Tensors have torch's default dtype; random parts of
a definition are drawn in float32 from a generator of their own (the global one is left alone), so they do not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import unknown_name
from ..problems.problem import ControlProblem
from ..problems.rewards import Linear, Quadratic, QuadraticCost
from ..processes.laws import Dirac
from ..processes.linear import LinearSDE
from ..processes.sde import SDE

__all__ = ["ProblemCard", "named_problem", "problem_card", "problem_names"]


@dataclass(frozen=True)
class ProblemCard:
    """A named problem with the discretisation it is usually solved on.

    Attributes:
        version: raised whenever the definition changes.
        make: makes the problem.
        time_steps, batch_size: the usual ones.
    """

    name: str
    version: int
    make: Callable[[], ControlProblem]
    time_steps: int
    batch_size: int

    @property
    def definition(self) -> str:
        """The definition in words."""
        return " ".join((self.make.__doc__ or "").split())


_CARDS: dict[str, ProblemCard] = {}


def _card(name: str, *, version: int, time_steps: int, batch_size: int) -> Callable:
    def add(make: Callable[[], ControlProblem]) -> Callable[[], ControlProblem]:
        _CARDS[name] = ProblemCard(name, version, make, time_steps, batch_size)
        return make

    return add


def problem_names() -> list[str]:
    """The names that :func:`named_problem` knows."""
    return sorted(_CARDS)


def problem_card(name: str) -> ProblemCard:
    """The card of a named problem: version, definition, usual time steps and batch size.

    Raises:
        ValueError: unknown name, with the nearest ones.
    """
    if name not in _CARDS:
        raise unknown_name("problem", name, _CARDS)
    return _CARDS[name]


def named_problem(name: str) -> ControlProblem:
    """A benchmark problem by its name: "ou-quadratic-easy", "ou-quadratic-hard", "ou-linear" or "double-well".

    The first three have an exact solution (:func:`exact_solution`). Definitions: ``problem_card(name).definition``.

    Raises:
        ValueError: unknown name, with the nearest ones.
    """
    return problem_card(name).make()


def _normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers of a definition, the ones that ``torch.manual_seed(seed)`` gives on CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float32).to(torch.get_default_dtype())


def _quadratic(drift: float, running: float, terminal: float) -> ControlProblem:
    """``b = drift x``, ``f = running |x|^2``, ``g = terminal |x|^2`` in 20 dimensions."""
    eye = torch.eye(20)
    return ControlProblem(
        LinearSDE(A=drift * eye, sigma=eye, horizon=1.0),
        initial=Dirac(0.5 * _normal(20)),
        reward=Quadratic(G=2 * terminal * eye),
        running_cost=QuadraticCost(F=2 * running * eye),
        alpha=1.0,
    )


@_card("ou-quadratic-easy", version=1, time_steps=50, batch_size=128)
def _ou_quadratic_easy() -> ControlProblem:
    """d = 20, b = 0.2 x, sigma = I, f = 0.2 |x|^2, g = 0.1 |x|^2; start 0.5 randn(20) with seed 0, |x0|^2 = 6.0257."""
    return _quadratic(0.2, 0.2, 0.1)


@_card("ou-quadratic-hard", version=1, time_steps=50, batch_size=128)
def _ou_quadratic_hard() -> ControlProblem:
    """d = 20, b = x, sigma = I, f = |x|^2, g = 0.5 |x|^2; start 0.5 randn(20) with seed 0, |x0|^2 = 6.0257."""
    return _quadratic(1.0, 1.0, 0.5)


@_card("ou-linear", version=1, time_steps=100, batch_size=64)
def _ou_linear() -> ControlProblem:
    """d = 10, b = (-I + xi) x, sigma = I + xi, f = 0, g = sum x; start 0; xi = 0.1 randn(10, 10) with seed 0."""
    xi, eye = 0.1 * _normal(10, 10), torch.eye(10)
    return ControlProblem(
        LinearSDE(A=-eye + xi, sigma=eye + xi, horizon=1.0),
        initial=Dirac(torch.zeros(10)),
        reward=Linear(-torch.ones(10)),
        alpha=1.0,
    )


@_card("double-well", version=1, time_steps=200, batch_size=128)
def _double_well() -> ControlProblem:
    """d = 10, b = -grad sum kappa_i (x_i^2 - 1)^2, sigma = I, f = 0, g = sum nu_i (x_i^2 - 1)^2, kappa = (5, 5, 5, 1, ...),
    nu = (3, 3, 3, 1, ...); start 0."""
    kappa, nu = torch.ones(10), torch.ones(10)
    kappa[:3], nu[:3] = 5.0, 3.0

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return -4 * kappa * x * (x**2 - 1)

    def reward(x: Tensor) -> Tensor:
        return -(nu * (x**2 - 1) ** 2).sum(-1)

    return ControlProblem(
        SDE(drift, diffusion=1.0, dim=10, horizon=1.0), initial=Dirac(torch.zeros(10)), reward=reward, alpha=1.0
    )
