"""Named systems to steer: coupled oscillators, a stochastic partial differential equation, mechanics with fewer noises
than states, an epidemic, an unstable drift over a long horizon, problems with several ways, and times of stopping.

As in ``library/problems.py`` ``noise`` is lam: it multiplies the variance of the noise, and alpha, with it.
"""

import math
from functools import partial

import torch
from torch import Tensor

from ..problems.problem import ControlProblem
from ..problems.rewards import Quadratic, QuadraticCost
from ..processes.laws import Dirac
from ..processes.linear import LinearSDE
from ..processes.sde import SDE
from .problems import add_problem, published_normal


@add_problem("kuramoto", version=1, time_steps=40, batch_size=256)
def _kuramoto(noise: float = 1.0, dim: int = 50) -> ControlProblem:
    """Coupled oscillators are to be synchronised: d = 50, b_i = omega_i + 1.5 mean_j sin(x_j - x_i), omega evenly from
    -1 to 1, sigma = 1/2, T = 2, f = 0, g = -12 |mean_j exp(i x_j)|^2; start evenly on the circle. log Z of the Euler
    chain of 40 steps is 2.872 +- 0.009 (40 000 reference paths)."""
    omega = torch.linspace(-1, 1, dim)

    def order(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin().mean(1, keepdim=True), x.cos().mean(1, keepdim=True)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        s, c = order(x)
        return omega.to(x) + 1.5 * (s * x.cos() - c * x.sin())

    def reward(x: Tensor) -> Tensor:
        s, c = order(x)
        return 12.0 * (s**2 + c**2).squeeze(1)

    start = torch.linspace(0, 2 * math.pi, dim + 1)[:-1]
    sde = SDE(drift, diffusion=0.5 * math.sqrt(noise), dim=dim, horizon=2.0)
    return ControlProblem(sde, initial=Dirac(start), reward=reward, alpha=noise)


@add_problem("allen-cahn", version=1, time_steps=100, batch_size=256)
def _allen_cahn(noise: float = 1.0) -> ControlProblem:
    """The stochastic Allen-Cahn equation on 64 points of a periodic unit interval, from -1 to +1 in the mean: b =
    0.01 x'' + x - x^3, sigma = 0.06 sqrt(64) at each point, T = 1, f = 0, g = 10 (mean x - 1)^2; start -1. Stiff: Euler
    is unstable at 50 steps."""
    dim = 64
    eye = torch.eye(dim)
    laplace = 0.01 * dim**2 * (eye.roll(1, 0) + eye.roll(-1, 0) - 2 * eye)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return x @ laplace.to(x) + x - x**3

    def reward(x: Tensor) -> Tensor:
        return -10 * (x.mean(1) - 1) ** 2

    sde = SDE(drift, diffusion=0.06 * math.sqrt(dim * noise), dim=dim, horizon=1.0)
    return ControlProblem(sde, initial=Dirac(-torch.ones(dim)), reward=reward, alpha=noise)


@add_problem("cart-pole", version=1, time_steps=100, batch_size=256)
def _cart_pole(noise: float = 1.0) -> ControlProblem:
    """A pole on a cart is swung up by force alone: state (position p, angle a from upright, speeds v, w), a pole of
    half a metre and a tenth of the cart's kilogram, T = 2; noise and control are a force of scale 5 on the cart, so
    that sigma = 5 (0, 0, dv/dF, dw/dF)' depends on the state; f = 1 - cos a + p^2/10, g = 10 (1 - cos a) + p^2 +
    (v^2 + w^2)/5; start hanging at rest, (0, pi, 0, 0)."""

    def turning(a: Tensor) -> Tensor:
        return 1 / (0.5 * (4 / 3 - 0.1 * a.cos() ** 2 / 1.1))

    def drift(x: Tensor, t: Tensor) -> Tensor:
        _, a, v, w = x.unbind(1)
        push = 0.05 * w**2 * a.sin() / 1.1
        faster = (9.81 * a.sin() - a.cos() * push) * turning(a)
        return torch.stack((v, w, push - 0.05 * faster * a.cos() / 1.1, faster), 1)

    def diffusion(x: Tensor, t: Tensor) -> Tensor:
        a = x[:, 1]
        faster = -a.cos() * turning(a) / 1.1
        zero = torch.zeros_like(a)
        force = torch.stack((zero, zero, 1 / 1.1 - 0.05 * faster * a.cos() / 1.1, faster), 1)
        return 5 * math.sqrt(noise) * force.unsqueeze(2)

    def cost(x: Tensor, t: Tensor) -> Tensor:
        return 1 - x[:, 1].cos() + 0.1 * x[:, 0] ** 2

    def reward(x: Tensor) -> Tensor:
        return -10 * (1 - x[:, 1].cos()) - x[:, 0] ** 2 - 0.2 * x[:, 2:].square().sum(1)

    return ControlProblem(
        SDE(drift, diffusion, dim=4, horizon=2.0),
        initial=Dirac(torch.tensor([0.0, math.pi, 0.0, 0.0])),
        reward=reward,
        running_cost=cost,
        alpha=noise,
    )


@add_problem("epidemic", version=1, time_steps=100, batch_size=256)
def _epidemic(noise: float = 1.0) -> ControlProblem:
    """An epidemic among 200 by its diffusion approximation: state (susceptible, infected) as parts of all, infections
    at the rate 2.5 s i and recoveries at the rate i, both clamped at 0, each with noise of the root of its rate over
    200; T = 4, f = 20 i, g = 20 i; start (0.95, 0.05)."""

    def rates(x: Tensor) -> tuple[Tensor, Tensor]:
        return (2.5 * x[:, 0] * x[:, 1]).clamp(min=0), x[:, 1].clamp(min=0)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        infected, recovered = rates(x)
        return torch.stack((-infected, infected - recovered), 1)

    def diffusion(x: Tensor, t: Tensor) -> Tensor:
        first, second = ((noise * rate / 200).sqrt() for rate in rates(x))
        zero = torch.zeros_like(first)
        return torch.stack((torch.stack((-first, zero), 1), torch.stack((first, -second), 1)), 1)

    def cost(x: Tensor, t: Tensor) -> Tensor:
        return 20 * x[:, 1]

    return ControlProblem(
        SDE(drift, diffusion, dim=2, horizon=4.0),
        initial=Dirac(torch.tensor([0.95, 0.05])),
        reward=lambda x: -20 * x[:, 1],
        running_cost=cost,
        alpha=noise,
    )


def _long(sign: float, noise: float) -> ControlProblem:
    eye = torch.eye(20)
    return ControlProblem(
        LinearSDE(A=sign * eye, sigma=math.sqrt(noise) * eye, horizon=4.0),
        initial=Dirac(0.5 * published_normal(20)),
        reward=Quadratic(G=eye),
        running_cost=QuadraticCost(F=2 * eye),
        alpha=noise,
    )


@add_problem("unstable-quadratic", version=1, time_steps=200, batch_size=64)
def _unstable_quadratic(noise: float = 1.0) -> ControlProblem:
    """ou-quadratic-hard over four times its horizon: d = 20, b = x, sigma = I, T = 4, f = |x|^2, g = |x|^2/2; start 0.5
    randn(20) with seed 0. Without control paths grow by e^4; the best control of the chain costs 112.129, and -log Z is
    109.471."""
    return _long(1.0, noise)


@add_problem("stable-quadratic", version=1, time_steps=200, batch_size=64)
def _stable_quadratic(noise: float = 1.0) -> ControlProblem:
    """The same with b = -x."""
    return _long(-1.0, noise)


@add_problem("pendulum-torque", version=1, time_steps=60, batch_size=256)
def _pendulum_torque(noise: float = 1.0) -> ControlProblem:
    """A pendulum is swung up by its torque, in two equally good ways: state (angle from hanging a, angular velocity w),
    b = (w, -9.81 sin a - w/10), sigma = (0, 2)', T = 3, alpha = 1/2, f = 1 + cos a, g = 10 (1 + cos a) + w^2/2; start
    at rest. log Z of the Euler chain of 60 steps is -13.3166 +- 1e-4 (recursion on a grid)."""

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return torch.stack((x[:, 1], -9.81 * x[:, 0].sin() - 0.1 * x[:, 1]), 1)

    def reward(x: Tensor) -> Tensor:
        return -10 * (1 + x[:, 0].cos()) - 0.5 * x[:, 1] ** 2

    return ControlProblem(
        SDE(drift, diffusion=torch.tensor([[0.0], [2.0 * math.sqrt(noise)]]), dim=2, horizon=3.0),
        initial=Dirac(torch.zeros(2)),
        reward=reward,
        running_cost=lambda x, t: 1 + x[:, 0].cos(),
        alpha=0.5 * noise,
    )


def _bump(distance: Tensor, width: float) -> Tensor:
    return torch.exp(-0.5 * (distance / width) ** 2)


@add_problem("double-slit", version=1, time_steps=80, batch_size=256)
def _double_slit(noise: float = 1.0) -> ControlProblem:
    """A particle on a line passes a wall at the time 1 through one of two slits (after Kappen 2005, with soft edges and
    slits that are not alike): d = 1, b = 0, sigma = 1, T = 2, f = 60 wall(x) exp(-(t - 1)^2 / 0.02), wall = 1 but for
    Gaussian dips of width 1/4 at -1.2 and 1.6; g = 2 x^2; start 0."""

    def cost(x: Tensor, t: Tensor) -> Tensor:
        wall = (1 - _bump(x[:, 0] + 1.2, 0.25)) * (1 - _bump(x[:, 0] - 1.6, 0.25))
        return 60 * wall * _bump(t - 1, 0.1)

    return ControlProblem(
        SDE(lambda x, t: torch.zeros_like(x), diffusion=math.sqrt(noise), dim=1, horizon=2.0),
        initial=Dirac(torch.zeros(1)),
        reward=lambda x: -2 * x[:, 0] ** 2,
        running_cost=cost,
        alpha=noise,
    )


@add_problem("obstacles", version=1, time_steps=50, batch_size=256)
def _obstacles(noise: float = 1.0) -> ControlProblem:
    """A point crosses the plane between obstacles: d = 2, b = 0, sigma = 1/2, T = 1, from 0 to (2, 0), g = 10 |x - (2,
    0)|^2, f = 30 sum_c exp(-50 |x - c|^4) over the centres c = (0.7, 0.1), (1.3, -0.5), (1.3, 0.6) of soft discs."""
    centres = torch.tensor([[0.7, 0.1], [1.3, -0.5], [1.3, 0.6]])
    goal = torch.tensor([2.0, 0.0])

    def cost(x: Tensor, t: Tensor) -> Tensor:
        squares = (x.unsqueeze(1) - centres.to(x)).square().sum(2)
        return 30 * _bump(squares, 0.1).sum(1)

    return ControlProblem(
        SDE(lambda x, t: torch.zeros_like(x), diffusion=0.5 * math.sqrt(noise), dim=2, horizon=1.0),
        initial=Dirac(torch.zeros(2)),
        reward=lambda x: -10 * (x - goal.to(x)).square().sum(1),
        running_cost=cost,
        alpha=noise,
    )


@add_problem("first-exit", version=1, time_steps=200, batch_size=256)
def _first_exit(noise: float = 1.0) -> ControlProblem:
    """The time to leave a well: d = 1, b = -grad (x^2 - 1)^2, sigma = 1, f = 1 until x reaches 1, where the path stops,
    or T = 4; r = 0; start in the other well, -1."""
    return ControlProblem(
        SDE(lambda x, t: -4 * x * (x**2 - 1), diffusion=math.sqrt(noise), dim=1, horizon=4.0),
        initial=Dirac(-torch.ones(1)),
        running_cost=lambda x, t: torch.ones_like(x[:, 0]),
        stop=lambda x: 1 - x[:, 0],
        alpha=noise,
    )


#: amplitudes, quadratic coefficients (xx, xy, yy) and centres of Mueller and Brown 1979
_MUELLER_BROWN = (
    (-200.0, (-1.0, 0.0, -10.0), (1.0, 0.0)),
    (-100.0, (-1.0, 0.0, -10.0), (0.0, 0.5)),
    (-170.0, (-6.5, 11.0, -6.5), (-0.5, 1.5)),
    (15.0, (0.7, 0.6, 0.7), (-1.0, 1.0)),
)


def _mueller_brown(x: Tensor, t: Tensor) -> Tensor:
    """Minus the gradient of a tenth of the potential of Mueller and Brown."""
    force = torch.zeros_like(x)
    for height, (xx, xy, yy), (first, second) in _MUELLER_BROWN:
        p, q = x[:, 0] - first, x[:, 1] - second
        value = 0.1 * height * (xx * p**2 + xy * p * q + yy * q**2).exp()
        slope = torch.stack((2 * xx * p + xy * q, xy * p + 2 * yy * q), 1)
        force = force - value.unsqueeze(1) * slope
    return force


def _apart(x: Tensor, centre: tuple[float, float]) -> Tensor:
    return (x - x.new_tensor(centre)).norm(dim=1) - 0.2


_LEFT, _RIGHT = (-0.558, 1.442), (0.623, 0.028)


@add_problem("committor-mueller-brown", version=1, time_steps=200, batch_size=256)
def _committor(noise: float = 1.0) -> ControlProblem:
    """A committor on the potential of Mueller and Brown (1979): b = -grad U/10, sigma = sqrt 2, stopped in discs of
    radius 0.2 around the two deepest minima (-0.558, 1.442) and (0.623, 0.028), r = 0 in the second and -inf elsewhere,
    so that Z is the probability to get there first, within T = 0.4; start (-1, 0.85), on the way out of
    the first."""
    near, stop = partial(_apart, centre=_RIGHT), partial(_apart, centre=_LEFT)
    return ControlProblem(
        SDE(_mueller_brown, diffusion=math.sqrt(2 * noise), dim=2, horizon=0.4),
        initial=Dirac(torch.tensor([-1.0, 0.85])),
        reward=lambda x: torch.where(near(x) <= 0, 0.0, -torch.inf),
        stop=lambda x: torch.minimum(near(x), stop(x)),
        alpha=noise,
    )
