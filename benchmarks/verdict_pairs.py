"""Pairs of a problem and an answer to it, each with its true log Z: half of the answers miss a mode, a neck, a tail
or a scale of their target, and know nothing of that.

Most wrong answers are right ones to another question: the exact control towards a part of the target. So their own
weights look as good as they can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sdecontrol as sc
from sdecontrol.controls.given import given_control
from sdecontrol.controls.mixture import MixtureControl
from sdecontrol.evaluation.solution import Solution

__all__ = ["PAIRS", "Pair"]

F64 = torch.float64


@dataclass(frozen=True)
class Pair:
    """A problem with an answer.

    Attributes:
        whole: whether the answer was made to reach all of the target; else ``lacks`` says what it lacks.
        make: the solution, and the true log Z of its chain.
    """

    name: str
    family: str
    make: Callable[[], tuple[Solution, float]]
    lacks: str = ""

    @property
    def whole(self) -> bool:
        return not self.lacks


def answer(problem: sc.ControlProblem, control: Any, steps: int) -> Solution:
    """A control as a solution that knows no exact answer."""
    kept = given_control(problem, control) if not isinstance(control, sc.Control) else control
    return Solution(problem, kept, method="given", settings={"time_steps": steps, "scheme": None})


# ---------------------------------------------------------------- densities that are mixtures, controls towards a part

Law = sc.GaussianMixture


def mixture(weights: list[float], means: Tensor, sds: list[float]) -> Law:
    """Isotropic components."""
    return Law(torch.tensor(weights), means, torch.tensor(sds).square()[:, None] * torch.ones_like(means))


def of_mixture(target: Law, reached: Law, scale: float, reference: str = "ou", steps: int = 40) -> Callable[[], Any]:
    """A density, and the exact control towards another law."""

    def make() -> tuple[Solution, float]:
        problem = sc.gibbs_problem(target.log_prob, target.means.shape[1], reference, scale=scale)
        law = Law(reached.log_weights.exp(), reached.means / scale, reached.variances / scale**2)
        return answer(problem, MixtureControl(problem, law), steps), 0.0

    return make


def shaken(law: Law, by: float) -> Law:
    """A law as fitted: means and widths a little off."""
    noise = torch.randn(law.means.shape, generator=torch.Generator().manual_seed(0))
    sds = law.variances.sqrt()
    return Law(law.log_weights.exp(), law.means + by * sds * noise, law.variances * (1 + by) ** 2)


def part_of(law: Law, keep: list[int]) -> Law:
    return Law(law.log_weights.exp()[keep] / law.log_weights.exp()[keep].sum(), law.means[keep], law.variances[keep])


def two(d: int, apart: float, weight: float = 0.5, sd: float = 0.5) -> Law:
    middle = torch.zeros(d)
    middle[0] = apart / 2
    return mixture([1 - weight, weight], torch.stack((-middle, middle)), [sd, sd])


def ring(count: int, radius: float, sd: float) -> Law:
    angle = torch.arange(count) * 2 * math.pi / count
    return mixture([1 / count] * count, radius * torch.stack((angle.cos(), angle.sin()), 1), [sd] * count)


def nested(d: int, weight: float, narrow: float, at: float) -> Law:
    """A wide component and a narrow one, ``at`` from its centre in every coordinate."""
    means = torch.stack((torch.zeros(d), torch.full((d,), at)))
    return mixture([1 - weight, weight], means, [1.0, narrow])


def densities() -> Iterator[Pair]:
    family = "density, control"
    for d, apart, weight, scale in [
        (1, 3.0, 0.5, 2.0),
        (1, 6.0, 0.2, 3.0),
        (2, 4.0, 0.5, 2.5),
        (2, 6.0, 0.1, 3.0),
        (3, 4.0, 0.3, 2.0),
        (5, 3.0, 0.5, 1.5),
        (5, 3.0, 0.1, 1.5),
        (8, 2.5, 0.5, 1.0),
        (12, 2.0, 0.4, 0.8),
    ]:
        law = two(d, apart, weight)
        name = f"two modes {apart:g} apart, {weight:g} in one, d = {d}"
        yield Pair(name, family, of_mixture(law, shaken(law, 0.05), scale))
        yield Pair(f"{name}: one", family, of_mixture(law, part_of(law, [0]), scale), "a mode")
    for kept in (8, 7, 6, 4, 2, 1):
        law = ring(8, 4.0, 0.4)
        name, lacks = f"{kept} of a ring of eight", "" if kept == 8 else "modes"
        yield Pair(name, family, of_mixture(law, shaken(part_of(law, list(range(kept))), 0.05), 3.0), lacks)
    for d, weight, narrow, at in [(1, 0.5, 0.1, 1.0), (2, 0.5, 0.2, 1.0), (2, 0.3, 0.05, 2.0), (5, 0.5, 0.3, 0.7)]:
        law = nested(d, weight, narrow, at)
        name = f"a spike of {narrow:g} with {weight:g}, d = {d}"
        yield Pair(name, family, of_mixture(law, shaken(law, 0.05), 1.3))
        yield Pair(f"{name}: none", family, of_mixture(law, part_of(law, [0]), 1.3), "a spike")
    for reference in ("ou", "brownian"):
        law = mixture([0.8, 0.2], torch.zeros(2, 2), [0.6, 2.5])
        name = f"a heavy shoulder, {reference}"
        yield Pair(name, family, of_mixture(law, shaken(law, 0.05), 2.5, reference))
        yield Pair(f"{name}: its core", family, of_mixture(law, part_of(law, [0]), 2.5, reference), "a tail")


# ---------------------------------------------------------------- plain functions in one dimension, optima on grids


@dataclass(frozen=True)
class Line:
    """A process on the line, of plain functions."""

    drift: Callable[[Tensor, Tensor], Tensor]
    reward: Callable[[Tensor], Tensor]
    cost: Callable[[Tensor, Tensor], Tensor] | None = None
    alpha: float = 1.0
    start: float = 0.0
    horizon: float = 1.0

    def problem(self, reward: Callable[[Tensor], Tensor] | None = None) -> sc.ControlProblem:
        sde = sc.SDE(self.drift, torch.ones((), dtype=F64), dim=1, horizon=self.horizon)
        start = sc.Dirac(torch.full((1,), self.start, dtype=F64))
        return sc.ControlProblem(sde, start, reward=reward or self.reward, running_cost=self.cost, alpha=self.alpha)


def on_line(line: Line, seen: Callable[[Tensor], Tensor] | None = None, steps: int = 40) -> Callable[[], Any]:
    """A process on the line, and the exact control for the reward that was ``seen``."""

    def make() -> tuple[Solution, float]:
        truth = float(sc.exact_solution(line.problem(), time_steps=steps).log_z)
        control = sc.exact_solution(line.problem(seen), time_steps=steps).control
        return answer(line.problem(), control, steps), truth

    return make


def free(x: Tensor, t: Tensor) -> Tensor:
    return torch.zeros_like(x)


def pulled(x: Tensor, t: Tensor) -> Tensor:
    return -x


def well(x: Tensor, t: Tensor) -> Tensor:
    return 3 * (x - x**3)


def bumps(*places: float, width: float = 0.3, share: float = 0.5) -> Callable[[Tensor], Tensor]:
    """Log of a sum of bumps, the first with a share of the height."""
    heights = [share, *[1 - share] * (len(places) - 1)] if len(places) > 1 else [1.0]

    def reward(x: Tensor) -> Tensor:
        terms = [math.log(h) - 0.5 * ((x[:, 0] - p) / width) ** 2 for h, p in zip(heights, places)]
        return torch.stack(terms).logsumexp(0)

    return reward


def lines() -> Iterator[Pair]:
    family = "process of functions, control"
    quadratic = lambda x: -2 * (x[:, 0] - 1) ** 2  # noqa: E731
    wave = lambda x: 2 * torch.sin(3 * x[:, 0])  # noqa: E731
    step_cost = lambda x, t: 6.0 * torch.sigmoid((x[:, 0] - 0.2) / 0.1)  # noqa: E731
    slope_cost = lambda x, t: x[:, 0].square() * t  # noqa: E731
    for name, line in {
        "free, quadratic": Line(free, quadratic),
        "pulled back, wave": Line(pulled, wave),
        "pulled back, wave, cold": Line(pulled, wave, alpha=0.4),
        "pulled back, forbidden zone": Line(pulled, lambda x: -0.5 * x[:, 0] ** 2, step_cost),
        "double well, quadratic": Line(well, quadratic, start=-1.0),
        "double well, cost in time": Line(well, quadratic, slope_cost, start=-1.0),
        "free, far": Line(free, lambda x: 3 * x[:, 0]),
        "free, farther": Line(free, lambda x: 4.5 * x[:, 0]),
    }.items():
        yield Pair(name, family, on_line(line))
    for name, drift, places, width, share, alpha in [
        ("free, bumps", free, (-1.5, 1.5), 0.4, 0.5, 1.0),
        ("free, uneven bumps", free, (1.0, -2.0), 0.4, 0.7, 1.0),
        ("free, narrow bumps", free, (-1.0, 1.0), 0.1, 0.5, 1.0),
        ("pulled back, bumps", pulled, (-1.5, 1.5), 0.3, 0.5, 1.0),
        ("double well, bumps", well, (-1.0, 1.0), 0.3, 0.5, 1.0),
        ("free, far bumps", free, (-3.0, 3.0), 0.4, 0.5, 1.0),
    ]:
        line = Line(drift, bumps(*places, width=width, share=share), alpha=alpha)
        yield Pair(name, family, on_line(line))
        yield Pair(f"{name}: one", family, on_line(line, bumps(places[0], width=width)), "a mode")
    for share, alpha in ((0.8, 1.0), (0.5, 0.6)):
        line = Line(pulled, bumps(1.0, -1.0, width=0.25, share=share), alpha=alpha)
        name = f"pulled back, bumps of {share:g}, alpha = {alpha:g}"
        yield Pair(name, family, on_line(line))
        yield Pair(f"{name}: the first", family, on_line(line, bumps(1.0, width=0.25)), "a mode")
    bowl = Line(free, lambda x: torch.log(0.05 + torch.exp(-8 * x[:, 0] ** 2)))
    yield Pair("free, a dent and a plain", family, on_line(bowl))
    yield Pair("free, a dent and a plain: the dent", family, on_line(bowl, lambda x: -8 * x[:, 0] ** 2), "a tail")


# ---------------------------------------------------------------- more dimensions: linear-quadratic, behind functions


def linear_quadratic(d: int, alpha: float, factor: float, running: bool) -> Callable[[], Any]:
    """A linear-quadratic problem of plain functions, and its exact control times a factor."""

    def make() -> tuple[Solution, float]:
        generator = torch.Generator().manual_seed(d)
        A = 0.3 * torch.randn(d, d, generator=generator, dtype=F64) - 0.5 * torch.eye(d, dtype=F64)
        g, start = torch.randn(d, generator=generator, dtype=F64), torch.randn(d, generator=generator, dtype=F64)
        known: dict[str, Any] = {"initial": sc.Dirac(start), "alpha": alpha}
        eye = torch.eye(d, dtype=F64)
        cost = sc.QuadraticCost(0.2 * eye) if running else None
        plain = sc.ControlProblem(sc.LinearSDE(A, eye), reward=sc.Quadratic(eye, g), running_cost=cost, **known)
        exact = sc.exact_solution(plain, time_steps=30)
        problem = sc.ControlProblem(
            sc.SDE(lambda x, t: x @ A.mT, torch.ones((), dtype=F64), dim=d),
            reward=lambda x: (x @ g) - 0.5 * x.square().sum(1),
            running_cost=(lambda x, t: 0.1 * x.square().sum(1)) if running else None,
            **known,
        )
        return answer(problem, lambda x, t: factor * exact.control(x, t), 30), float(exact.log_z)

    return make


def pendulum(one_way: bool) -> Callable[[], Any]:
    """Swing up by torque noise: two equally good ways. log Z by a backward recursion on 200 x 321 points."""

    def make() -> tuple[Solution, float]:
        sde = sc.SDE(
            lambda x, t: torch.stack([x[:, 1], -9.81 * torch.sin(x[:, 0]) - 0.1 * x[:, 1]], 1),
            torch.tensor([[0.0], [2.0]]),
            dim=2,
            horizon=3.0,
        )
        problem = sc.ControlProblem(
            sde,
            sc.Dirac(torch.zeros(2)),
            reward=lambda x: -10 * (1 + torch.cos(x[:, 0])) - 0.5 * x[:, 1] ** 2,
            running_cost=lambda x, t: 1 + torch.cos(x[:, 0]),
            alpha=0.5,
        )
        if one_way:
            solution = sc.solve(problem, sc.AdjointMatching(), time_steps=60, iterations=200, seed=0, progress=False)
            return solution, -13.3166
        return sc.solve(problem, sc.SMC(num_particles=4096), time_steps=60, seed=0, progress=False), -13.3166

    return make


def wide() -> Iterator[Pair]:
    family = "process of functions, control"
    yield Pair("pendulum, a control that takes one way", family, pendulum(True), "a way")
    yield Pair("pendulum, particles", family, pendulum(False))
    for d, alpha, running in [(2, 1.0, False), (5, 1.0, True), (5, 0.5, False), (10, 1.0, True), (20, 1.0, False)]:
        name = f"linear-quadratic, d = {d}, alpha = {alpha:g}{', running cost' if running else ''}"
        yield Pair(name, family, linear_quadratic(d, alpha, 0.95, running))
    yield Pair("linear-quadratic, d = 10: reversed", family, linear_quadratic(10, 0.5, -0.5, True), "the way")
    yield Pair("linear-quadratic, d = 5: no control", family, linear_quadratic(5, 0.1, 0.0, False), "the way")


# ---------------------------------------------------------------- generative models


def generative(share: float, alpha: float, kept: list[int] | None, steps: int = 50) -> Callable[[], Any]:
    """A mixture as the model, a linear reward; and the exact control, or the control towards a part of the tilt."""

    def make() -> tuple[Solution, float]:
        law = Law(torch.tensor([1 - share, share], dtype=F64), torch.tensor([[-1.5], [1.5]], dtype=F64), 0.2)
        sde = sc.generative_sde(law, sc.VP(), shape=(1,))
        start = sc.Gaussian(torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64))
        slope = sc.Linear(torch.ones(1, dtype=F64))
        problem = sc.ControlProblem(sde, start, reward=lambda x: x[:, 0], alpha=alpha)
        exact = sc.exact_solution(sc.ControlProblem(sde, start, reward=slope, alpha=alpha), time_steps=steps)
        if kept is None:
            return answer(problem, exact.control, steps), float(exact.log_z)
        means = law.means + 0.2 / alpha
        tilted = (law.log_weights.exp().log() + law.means[:, 0] / alpha).softmax(0)
        reached = Law(tilted[kept] / tilted[kept].sum(), means[kept], law.variances[kept])
        return answer(problem, MixtureControl(problem, reached), steps), float(exact.log_z)

    return make


def models() -> Iterator[Pair]:
    family = "model, control"
    for share, alpha in [(0.5, 1.0), (0.2, 0.5), (0.05, 1.0), (0.5, 3.0)]:
        yield Pair(f"model of two modes, {share:g} in one, alpha = {alpha:g}", family, generative(share, alpha, None))
    for share, alpha, kept in [(0.5, 3.0, 1), (0.05, 1.0, 0), (0.2, 2.0, 1), (0.1, 3.0, 0)]:
        name = f"model of two modes, {share:g} in one, alpha = {alpha:g}: one"
        yield Pair(name, family, generative(share, alpha, [kept]), "a mode")


# ---------------------------------------------------------------- particles and chains on densities


def sampled(density: Callable[[Tensor], Tensor], d: int, method: Any, log_z: float, **more: Any) -> Callable[[], Any]:
    def make() -> tuple[Solution, float]:
        problem = sc.gibbs_problem(density, d, **{"seed": 0, **more})
        return sc.solve(problem, method, seed=0, progress=False), log_z

    return make


def normal(x: Tensor) -> Tensor:
    return -0.5 * x.square().sum(1)


def funnel(x: Tensor) -> Tensor:
    v, rest = x[:, 0], x[:, 1:]
    return -(v**2) / 18 - 0.5 * rest.square().sum(1) * torch.exp(-v) - 0.5 * rest.shape[1] * v


def banana(x: Tensor) -> Tensor:
    return -0.5 * (x[:, 0] / 2) ** 2 - 0.5 * ((x[:, 1] - 0.5 * x[:, 0] ** 2) / 0.5) ** 2


def wells(x: Tensor) -> Tensor:
    return -(x[:, :2].square() - 2).square().sum(1) - 0.5 * x[:, 2:].square().sum(1)


def scaled(*sds: float, at: float = 0.0) -> Callable[[Tensor], Tensor]:
    def density(x: Tensor) -> Tensor:
        return torch.distributions.Normal(at, torch.tensor(sds).to(x)).log_prob(x).sum(1)

    return density


_ONE_WELL = 1.3404451183  # integral of exp(-(s^2 - 2)^2), by quadrature
_LOG_2PI = math.log(2 * math.pi)


def particles() -> Iterator[Pair]:
    family = "density, particles or chains"
    tempered, plain = sc.TemperedSMC(num_particles=1024), sc.SMC(num_particles=1024)
    auto, hmc = sc.Auto(num_particles=1024), sc.HMC(num_chains=64)
    dw = 2 * math.log(_ONE_WELL)
    for name, density, d, log_z in [
        ("normal", normal, 3, 1.5 * _LOG_2PI),
        ("banana", banana, 2, math.log(2 * math.pi * 2 * 0.5)),
        ("four wells", wells, 4, dw + _LOG_2PI),
        ("scales 1 to 30", scaled(1.0, 5.0, 30.0), 3, 0.0),
    ]:
        for label, method in (("tempered", tempered), ("auto", auto), ("hmc", hmc)):
            yield Pair(f"{name}, {label}", family, sampled(density, d, method, log_z))
    for label, method in (("smc", plain), ("tempered", tempered)):
        law = two(2, 3.0)
        yield Pair(f"two modes, {label}", family, sampled(law.log_prob, 2, method, 0.0, scale=2.0))
    yield Pair("normal, smc", family, sampled(normal, 3, plain, 1.5 * _LOG_2PI, scale=1.2))
    far = two(2, 10.0, 0.5, 0.5)
    for label, method in (("tempered", tempered), ("hmc", hmc), ("auto", auto)):
        yield Pair(
            f"funnel, {label}",
            family,
            sampled(funnel, 10, method, 0.5 * math.log(18 * math.pi) + 4.5 * _LOG_2PI),
            "a neck",
        )
        yield Pair(
            f"modes 10 apart, {label}",
            family,
            sampled(far.log_prob, 2, method, 0.0, centre=torch.tensor([-5.0, 0.0]), scale=1.0),
            "a mode",
        )
        spike = nested(5, 0.5, 0.02, 2.0)
        yield Pair(
            f"a spike of 0.02, d = 5, {label}", family, sampled(spike.log_prob, 5, method, 0.0, scale=1.3), "a spike"
        )
    yield Pair(
        "scales 1e-3 to 1e3 far from 0, tempered",
        family,
        sampled(scaled(1e-3, 1e3, at=2000.0), 2, tempered, 0.0),
        "a scale",
    )
    yield Pair(
        "scales 1e-3 to 1e3 far from 0, auto", family, sampled(scaled(1e-3, 1e3, at=2000.0), 2, auto, 0.0), "a scale"
    )
    yield Pair(
        "smc far from the reference",
        family,
        sampled(lambda x: normal(x - 6), 5, plain, 2.5 * _LOG_2PI, scale=1.0, centre=0.0),
        "the way",
    )


PAIRS: tuple[Pair, ...] = (*densities(), *lines(), *wide(), *models(), *particles())
