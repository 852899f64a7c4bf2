"""Named control problems: fixed, versioned definitions with their usual discretisation.

The first four are the card of Domingo-Enrich et al. 2312.02027 and of its published settings:
``dX = (b + sigma u) dt + sqrt(lam) sigma dW``, cost ``E[int (|u|^2/2 + f) dt + g(X_T)]``, T = 1, one fixed start, lam =
1. That convention scales the noise and leaves the control alone; this package's control has the noise's own units. With
``noise=lam`` the same problem is, in the convention of this package::

    diffusion sqrt(lam) sigma,   alpha = lam,   reward -g,   running cost f,   u (published) = sqrt(lam) u (here),

and ``-alpha log Z`` is the smallest published cost for a point start. The two conventions agree at lam = 1.

Tensors have torch's default dtype; random parts of a definition are drawn in float32 from a generator of their own (the
global one is left alone), so they do not depend on it.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..errors import check_name
from ..problems.problem import ControlProblem
from ..problems.rewards import Linear, Quadratic, QuadraticCost
from ..processes.laws import Dirac, Gaussian
from ..processes.linear import BrownianMotion, LinearSDE
from ..processes.sde import SDE
from ..randomness import published_generator
from ..tensors import as_float
from .target_base import Card, register


@dataclass(frozen=True)
class ProblemCard(Card):
    """A named problem with the discretisation it is usually solved on.

    Attributes:
        version: raised whenever the definition changes.
        make: ``make(noise=1.0)`` makes the problem; noise is the published lam (see the module's head).
        time_steps, batch_size: the usual ones.
    """

    time_steps: int
    batch_size: int


_CARDS: dict[str, ProblemCard] = {}


add_problem = partial(register, _CARDS, ProblemCard)


def problem_names() -> list[str]:
    """The names that :func:`named_problem` knows."""
    return sorted(_CARDS)


def problem_card(name: str) -> ProblemCard:
    """The card of a named problem: version, definition, usual time steps and batch size.

    Raises:
        ValueError: unknown name, with the nearest ones.
    """
    check_name("problem", name, _CARDS)
    return _CARDS[name]


def named_problem(name: str, noise: float = 1.0) -> ControlProblem:
    """A benchmark problem by its name (:func:`problem_names`). Definitions: ``problem_card(name).definition``.

    Args:
        noise: the published lam > 0: the noise is ``sqrt(lam) sigma`` and alpha is lam, with drift and costs unchanged.
            The published control is ``sqrt(lam)`` times the one of this package.

    Raises:
        ValueError: unknown name, with the nearest ones; or noise not positive.
    """
    return problem_card(name).make(as_float("noise", noise, positive=True))


def published_normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers of a definition, the ones that ``torch.manual_seed(seed)`` gives on CPU."""
    generator = published_generator(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float32).to(torch.get_default_dtype())


def _quadratic(drift: float, running: float, terminal: float, noise: float) -> ControlProblem:
    """``b = drift x``, ``f = running |x|^2``, ``g = terminal |x|^2`` in 20 dimensions."""
    eye = torch.eye(20)
    return ControlProblem(
        LinearSDE(A=drift * eye, sigma=math.sqrt(noise) * eye, horizon=1.0),
        initial=Dirac(0.5 * published_normal(20)),
        reward=Quadratic(G=2 * terminal * eye),
        running_cost=QuadraticCost(F=2 * running * eye),
        alpha=noise,
    )


@add_problem("ou-quadratic-easy", version=1, time_steps=50, batch_size=128)
def _ou_quadratic_easy(noise: float = 1.0) -> ControlProblem:
    """d = 20, b = 0.2 x, sigma = I, f = 0.2 |x|^2, g = 0.1 |x|^2; start 0.5 randn(20) with seed 0, |x0|^2 = 6.0257."""
    return _quadratic(0.2, 0.2, 0.1, noise)


@add_problem("ou-quadratic-hard", version=1, time_steps=50, batch_size=128)
def _ou_quadratic_hard(noise: float = 1.0) -> ControlProblem:
    """d = 20, b = x, sigma = I, f = |x|^2, g = 0.5 |x|^2; start 0.5 randn(20) with seed 0, |x0|^2 = 6.0257. Published
    on 50 steps with batches of 128, and on 150 steps with batches of 64."""
    return _quadratic(1.0, 1.0, 0.5, noise)


@add_problem("ou-linear", version=1, time_steps=100, batch_size=64)
def _ou_linear(noise: float = 1.0) -> ControlProblem:
    """d = 10, b = (-I + xi) x, sigma = I + xi, f = 0, g = sum x; start 0; xi = 0.1 randn(10, 10) with seed 0."""
    xi, eye = 0.1 * published_normal(10, 10), torch.eye(10)
    return ControlProblem(
        LinearSDE(A=-eye + xi, sigma=math.sqrt(noise) * (eye + xi), horizon=1.0),
        initial=Dirac(torch.zeros(10)),
        reward=Linear(-torch.ones(10)),
        alpha=noise,
    )


@add_problem("double-well", version=1, time_steps=200, batch_size=128)
def _double_well(noise: float = 1.0) -> ControlProblem:
    """d = 10, b = -grad sum kappa_i (x_i^2 - 1)^2, sigma = I, f = 0, g = sum nu_i (x_i^2 - 1)^2, kappa = (5, 5, 5, 1,
    ...), nu = (3, 3, 3, 1, ...); start 0."""
    kappa, nu = torch.ones(10), torch.ones(10)
    kappa[:3], nu[:3] = 5.0, 3.0

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return -4 * kappa * x * (x**2 - 1)

    def reward(x: Tensor) -> Tensor:
        return -(nu * (x**2 - 1) ** 2).sum(-1)

    return ControlProblem(
        SDE(drift, diffusion=math.sqrt(noise), dim=10, horizon=1.0),
        initial=Dirac(torch.zeros(10)),
        reward=reward,
        alpha=noise,
    )


@add_problem("double-well-1d", version=1, time_steps=100, batch_size=128)
def _double_well_1d(noise: float = 1.0) -> ControlProblem:
    """d = 1, b = -grad 2 (x^2 - 1)^2, sigma = 1, f = 0, g = 3 (x - 1)^2; start in the other well, -1."""

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return -8 * x * (x**2 - 1)

    def reward(x: Tensor) -> Tensor:
        return -3 * ((x - 1) ** 2).sum(-1)

    return ControlProblem(
        SDE(drift, diffusion=math.sqrt(noise), dim=1, horizon=1.0),
        initial=Dirac(-torch.ones(1)),
        reward=reward,
        alpha=noise,
    )


@add_problem("double-well-2d", version=1, time_steps=100, batch_size=128)
def _double_well_2d(noise: float = 1.0) -> ControlProblem:
    """d = 2, b = -grad U, U = (x^2 - 1)^2 + (y - x/2)^2 (the coordinates are coupled), sigma = I, f = 0.1 y^2,
    g = 2 ((x - 1)^2 + (y - 1/2)^2); start in the other well, (-1, -1/2)."""

    def drift(x: Tensor, t: Tensor) -> Tensor:
        apart = x[:, 1] - 0.5 * x[:, 0]
        return torch.stack((-4 * x[:, 0] * (x[:, 0] ** 2 - 1) + apart, -2 * apart), 1)

    def reward(x: Tensor) -> Tensor:
        return -2 * ((x[:, 0] - 1) ** 2 + (x[:, 1] - 0.5) ** 2)

    def cost(x: Tensor, t: Tensor) -> Tensor:
        return 0.1 * x[:, 1] ** 2

    return ControlProblem(
        SDE(drift, diffusion=math.sqrt(noise), dim=2, horizon=1.0),
        initial=Dirac(torch.tensor([-1.0, -0.5])),
        reward=reward,
        running_cost=cost,
        alpha=noise,
    )


@add_problem("pendulum-swing-up", version=1, time_steps=100, batch_size=128)
def _pendulum(noise: float = 1.0) -> ControlProblem:
    """A pendulum on a cart that is pushed: state (angle from upright, angular velocity), T = 2, b = (w, 4 sin a - w/5),
    the cart's acceleration as control and noise, sigma = (0, -3 cos a)' (d = 2, m = 1, depends on the state, vanishes
    at the horizontal); f = 0, g = 4 (1 - cos a) + w^2/4; start hanging at rest, (pi, 0)."""

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return torch.stack((x[:, 1], 4 * x[:, 0].sin() - 0.2 * x[:, 1]), 1)

    def diffusion(x: Tensor, t: Tensor) -> Tensor:
        push = -3 * math.sqrt(noise) * x[:, 0].cos()
        return torch.stack((torch.zeros_like(push), push), 1).unsqueeze(-1)

    def reward(x: Tensor) -> Tensor:
        return -4 * (1 - x[:, 0].cos()) - 0.25 * x[:, 1] ** 2

    return ControlProblem(
        SDE(drift, diffusion, dim=2, horizon=2.0),
        initial=Dirac(torch.tensor([math.pi, 0.0])),
        reward=reward,
        alpha=noise,
    )


@add_problem("unicycle", version=1, time_steps=100, batch_size=128)
def _unicycle(noise: float = 1.0) -> ControlProblem:
    """A unicycle parks: state (x, y, heading a), T = 1, b = 0, control and noise are speed and turning, sigma = ((cos
    a, 0), (sin a, 0), (0, 2)) (d = 3, m = 2, depends on the state); f = 0, g = 4 (x^2 + y^2) + 1 - cos a; start (0, 1,
    0), beside the place."""

    def diffusion(x: Tensor, t: Tensor) -> Tensor:
        zero = torch.zeros_like(x[:, 2])
        ahead = torch.stack((x[:, 2].cos(), x[:, 2].sin(), zero), 1)
        turn = torch.stack((zero, zero, zero + 2), 1)
        return math.sqrt(noise) * torch.stack((ahead, turn), 2)

    def reward(x: Tensor) -> Tensor:
        return -4 * (x[:, :2] ** 2).sum(1) - (1 - x[:, 2].cos())

    return ControlProblem(
        SDE(lambda x, t: torch.zeros_like(x), diffusion, dim=3, horizon=1.0),
        initial=Dirac(torch.tensor([0.0, 1.0, 0.0])),
        reward=reward,
        alpha=noise,
    )


@add_problem("mixture-steering", version=1, time_steps=100, batch_size=256)
def _mixture_steering(noise: float = 1.0) -> ControlProblem:
    """From a Gaussian towards a mixture: d = 2, Brownian motion from N(0, I), T = 1, so that X_T ~ N(0, 2 I); reward
    log p - log N(0, 2 I), p the equal mixture of N((+-2, +-2), I/4). At lam = 1 log Z = 0, and the tilted end is p for
    a controlled start; the start is fixed, as in a Schroedinger bridge."""

    def reward(x: Tensor) -> Tensor:
        both = torch.stack((-2 * (x - 2) ** 2, -2 * (x + 2) ** 2)).logsumexp(0) + math.log(0.5) - 0.5 * math.log(0.25)
        return (both + 0.25 * x**2 + 0.5 * math.log(2.0)).sum(-1)

    return ControlProblem(
        BrownianMotion(2, math.sqrt(noise) * torch.eye(2), horizon=1.0),
        initial=Gaussian(torch.zeros(2), 1.0),
        reward=reward,
        alpha=noise,
    )


@add_problem("ring-steering", version=1, time_steps=100, batch_size=256)
def _ring_steering(noise: float = 1.0) -> ControlProblem:
    """From a Gaussian towards a ring: d = 2, Brownian motion from N(0, I/4), T = 1, f = 0, g = (|x|^2 - 4)^2 / 4 (a
    tempered ring of radius 2); the start is fixed, as in a Schroedinger bridge."""

    def reward(x: Tensor) -> Tensor:
        return -0.25 * ((x**2).sum(-1) - 4) ** 2

    return ControlProblem(
        BrownianMotion(2, math.sqrt(noise) * torch.eye(2), horizon=1.0),
        initial=Gaussian(torch.zeros(2), 0.25),
        reward=reward,
        alpha=noise,
    )


@add_problem("non-symmetric-quadratic", version=1, time_steps=50, batch_size=128)
def _non_symmetric_quadratic(noise: float = 1.0) -> ControlProblem:
    """d = 50, b = (-I/2 + N) x, sigma = (I + 0.3 M) without its last ten columns (m = 40), f = |x|^2/4, g = |x|^2/2 -
    sum x; start 0.5 randn(50) with seed 0; N, M = randn(50, 50)/sqrt(50) with seeds 1, 2, neither symmetric nor
    normal."""
    N, M = published_normal(50, 50, seed=1) / math.sqrt(50), published_normal(50, 50, seed=2) / math.sqrt(50)
    eye = torch.eye(50)
    return ControlProblem(
        LinearSDE(A=-0.5 * eye + N, sigma=math.sqrt(noise) * (eye + 0.3 * M)[:, :40], horizon=1.0),
        initial=Dirac(0.5 * published_normal(50)),
        reward=Quadratic(G=eye, g=torch.ones(50)),
        running_cost=QuadraticCost(F=0.5 * eye),
        alpha=noise,
    )
