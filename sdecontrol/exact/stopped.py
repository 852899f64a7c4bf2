"""The exact solution of a one-dimensional chain that stops in a region, or whose reward is -inf somewhere.

Soft values of such a chain jump where the region begins: a state just outside may step over its edge or away from it.
Averages over a step are therefore sums over nodes in the place of the step's end, laid panel by panel between the edges
(Nystroem's method with Gauss-Legendre panels): with Gaussian weights ``N(y_j; m(x), s(x))`` each of them is a smooth
integrand on its panel, and a value between the nodes is the same sum again. Inside the region values are ``r/alpha``
for ever.
"""

from __future__ import annotations

import math
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.shifts import ShiftFunction
from ..errors import NoExactSolution
from ..memory import Remembered
from ..problems.problem import ControlProblem
from ..processes.laws import Dirac, draw
from ..randomness import Place, generator_for
from ..shapes import Controls, PerPath, Scalar, States
from .base import ExactSolution
from .probing import Functions

_ORDER = 10  # nodes of a panel
_WIDTH = 1.5  # of a panel, in standard deviations of the narrowest step
_MOST = 4000  # nodes
_PATHS = 512  # that say where the process goes
_JUMP = 1e-3  # of a reward, relative to its range
_EDGE = 1e-13  # an edge is known to that, relative to the range
_STABLE = 1e-9  # change of log Z at which the range is wide enough
_WIDEST = 16  # times that it is widened by a quarter on both sides
_TINY = 1e-150  # of an average, below which it is taken in logarithms
_HELD = 1 << 22  # numbers of a block of kernels
_SHIFTS = np.linspace(-6.0, 6.0, 25)  # in standard deviations, among which the best is looked for


class Nodes(NamedTuple):
    """Nodes ``y (N,)`` of sums over the line, with the logarithms of their weights; whether each is inside the region;
    and ``r/alpha`` there."""

    y: np.ndarray
    log_weights: np.ndarray
    inside: np.ndarray
    reward: np.ndarray


class Steps(NamedTuple):
    """A step from given states: mean and scale ``(n,)``, ``h f/alpha`` ``(n,)``."""

    mean: np.ndarray
    scale: np.ndarray
    cost: np.ndarray


class Kernel:
    """A step's Gaussians as weights of the nodes, ``(n, N)``, normalised: a step beyond the last node ends at the last
    nodes."""

    def __init__(self, nodes: Nodes, mean: np.ndarray, scale: np.ndarray) -> None:
        z = (nodes.y - mean[:, None]) / scale[:, None]
        self.logs = nodes.log_weights - 0.5 * z * z
        self.logs -= self.logs.max(1, keepdims=True)
        self.weights = np.exp(self.logs)
        total = self.weights.sum(1, keepdims=True)
        self.weights /= total
        self.logs -= np.log(total)
        self.nodes, self.mean, self.scale = nodes, mean, scale

    def log_average(self, values: np.ndarray) -> np.ndarray:
        """``log sum_j w_ij exp(values_j)``, ``(n,)``; -inf where nothing is left."""
        top = values.max()
        if top == -np.inf:
            return np.full(len(self.mean), -np.inf)
        average = self.weights @ np.exp(values - top)
        few = np.flatnonzero(average < _TINY)  # there terms have been lost
        with np.errstate(divide="ignore"):
            found = top + np.log(average)
            if len(few):
                terms = self.logs[few] + values
                most = terms.max(1)
                most = np.where(np.isfinite(most), most, 0.0)
                found[few] = most + np.log(np.exp(terms - most[:, None]).sum(1))
        return found

    def mean_shift(self, values: np.ndarray) -> np.ndarray:
        """``E[xi]`` under the kernel tilted by ``exp(values)``, ``(n,)``; 0 where nothing is left of it."""
        level = self.log_average(values)
        left = np.isfinite(level)
        tilted = np.exp(self.logs[left] + values - level[left, None])
        shift = np.zeros(len(self.mean))
        shift[left] = (tilted @ self.nodes.y - self.mean[left] * tilted.sum(1)) / self.scale[left]
        return shift


class StoppedChainSolution(ExactSolution):
    """Exact solution of a one-dimensional chain with a region to stop in, or with a reward that is -inf somewhere.

    ``value``, ``log_z`` and ``start_log_z`` are those of the soft-optimal chain. ``control`` and ``elbo`` are the best
    mean-shift chain's where the reward is a number wherever the chain can go; else there is none (every Gaussian shift
    has an objective of -inf): ``elbo`` is -inf, and ``control`` the mean shift of the soft-optimal kernel, O(h) from
    ``sigma grad log psi``. Errors are those of rounding and of edges, about 1e-9. Laws are not computed.
    """

    kind = "panels"

    def __init__(self, problem: ControlProblem, chain: Chain, settings: dict[str, Any]) -> None:
        super().__init__(problem, settings, chain)
        if problem.event_shape.numel() != 1 or not problem.reference.gaussian:
            raise NoExactSolution(
                "stop: panels are for one coordinate with Gaussian steps, and this problem has "
                f"{problem.event_shape.numel()} coordinates of a {type(problem.reference).__name__}."
            )
        self._wide = chain.double()
        self._functions = Functions(problem, getattr(self._wide, "inner", self._wide))
        self._homogeneous = self._same_steps()
        self._shifts_of = Remembered(self._shift_at, chain.steps)
        self._solve()

    # ---------------------------------------------------------------- what the problem says

    def _inside(self, y: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(y)[:, None]
        with torch.no_grad(), self.problem.evaluating():
            found = self._wide.inside(x.to(self.problem.device))
        return np.zeros(len(y), dtype=bool) if found is None else found.cpu().numpy()

    def _reward(self, y: np.ndarray) -> np.ndarray:
        return self._functions.reward(torch.from_numpy(y)[:, None]).numpy()

    def _steps(self, y: np.ndarray, k: int) -> Steps:
        """Step k of the chain from states y, were it not stopped."""
        x, h, t = torch.from_numpy(y)[:, None], self.chain.step_sizes[k], self.chain.clock[k]  # type: ignore[union-attr]
        mean, scale = self._functions.step(x, k)
        rows = self._functions.rows(scale, [0], len(x)).norm(dim=(1, 2)).numpy()
        return Steps(mean[:, 0].numpy(), rows, h * self._functions.cost(x, t).numpy())

    def _same_steps(self) -> bool:
        y = np.linspace(-1.7, 1.9, 7)
        first, *others = (self._steps(y, k) for k in range(self._wide.steps))
        return all(np.allclose(a, b, rtol=1e-12, atol=0.0) for other in others for a, b in zip(first, other))

    def _range(self) -> tuple[float, float, float]:
        """Where the reference's paths go, and the narrowest step there."""
        x = draw(self.problem.origin, _PATHS, 0).to("cpu", torch.float64)
        generator = generator_for("cpu", 0, Place.STOPPED_WALK)
        low, high, narrow = float(x.min()), float(x.max()), math.inf
        for k in range(self._wide.steps):
            mean, scale = self._functions.step(x, k)
            rows = self._functions.rows(scale, [0], len(x))
            narrow = min(narrow, float(rows.norm(dim=(1, 2)).min()))
            xi = torch.randn(len(x), rows.shape[2], generator=generator, dtype=torch.float64)
            x = mean + (rows @ xi.unsqueeze(2)).squeeze(2)
            x = x[torch.isfinite(x).all(1)]
            if len(x) < _PATHS // 2:
                raise NoExactSolution("drift: most paths run to infinity, so there are no panels to solve on.")
            low, high = min(low, float(x.min())), max(high, float(x.max()))
        if not narrow > 0:
            raise NoExactSolution("diffusion: it is 0 at some states, and panels need noise everywhere.")
        return low, high, narrow

    # ---------------------------------------------------------------- nodes

    def _kinds(self, y: np.ndarray) -> np.ndarray:
        """What changes at an edge: whether the state is inside, and whether its reward is a number."""
        return self._inside(y) + 2 * np.isfinite(self._reward(y))

    def _edges(self, low: float, high: float, width: float) -> np.ndarray:
        """Where the region, or the set where the reward is a number, begins or ends, or the reward jumps, by bisection
        between points half a panel apart."""
        y = np.linspace(low, high, int(2 * (high - low) / width) + 2)
        kinds, reward = self._kinds(y), np.nan_to_num(self._reward(y), neginf=0.0)
        span = np.ptp(reward) + 1e-300
        changes = np.flatnonzero((kinds[1:] != kinds[:-1]) | (np.abs(np.diff(reward)) > _JUMP * span))
        a, b = y[changes], y[changes + 1]
        sides = [[v[changes + i] for v in (kinds, reward)] for i in (0, 1)]
        while len(a) and float((b - a).max()) > _EDGE * (high - low):
            middle = 0.5 * (a + b)
            here = [self._kinds(middle), np.nan_to_num(self._reward(middle), neginf=0.0)]
            ((kind, value), (other, last)) = sides
            left = np.where(kind != other, here[0] == kind, np.abs(here[1] - value) < np.abs(here[1] - last))
            a, b = np.where(left, middle, a), np.where(left, b, middle)
            sides = [
                [np.where(left, h, v) for h, v in zip(here, sides[0])],
                [np.where(left, v, h) for h, v in zip(here, sides[1])],
            ]
        if len(a):
            real = (sides[0][0] != sides[1][0]) | (np.abs(sides[0][1] - sides[1][1]) > _JUMP * span)
            a, b = a[real], b[real]
        return np.array([low, *(0.5 * (a + b)).tolist(), high])

    def _lay(self, low: float, high: float, width: float) -> Nodes:
        points, weights = np.polynomial.legendre.leggauss(_ORDER)
        edges = self._edges(low, high, width)
        pieces = [np.linspace(a, b, max(1, math.ceil((b - a) / width)) + 1)[:-1] for a, b in pairwise(edges)]
        self._ends = np.array([*np.concatenate(pieces), high])
        half = 0.5 * np.diff(self._ends)[:, None]
        y = (self._ends[:-1, None] + half * (1 + points)).ravel()
        if len(y) > _MOST:
            if self._tried:
                raise self._lost()
            raise NoExactSolution(
                f"the steps' noise is so narrow (a standard deviation of {width / _WIDTH:.2g} on [{low:.3g}, "
                f"{high:.3g}]) that {len(y)} nodes would be needed, of {_MOST} at most; use fewer time steps."
            )
        return Nodes(y, np.log((half * weights).ravel()), self._inside(y), self._reward(y))

    # ---------------------------------------------------------------- the recursion

    def _solve(self) -> None:
        low, high, narrow = self._range()
        before = math.nan
        for self._tried in range(_WIDEST):
            self._nodes = self._lay(low, high, _WIDTH * narrow)
            self._soft = self._backwards()
            now = self._start_value(soft=True)
            if abs(now - before) <= _STABLE * (1 + abs(now)):
                return
            slack, before = 0.25 * (high - low), now
            low, high = low - slack, high + slack
        raise self._lost()

    def _kernel(self, k: int) -> tuple[Kernel, np.ndarray]:
        """Step k from the nodes outside of the region, and its costs there."""
        step = self._steps(self._nodes.y[self._out_nodes], k)
        if self._held is None or not self._homogeneous:
            self._held = Kernel(self._nodes, step.mean, step.scale)
        return self._held, step.cost

    @staticmethod
    def _lost() -> NoExactSolution:
        return NoExactSolution(
            "optimal paths leave every range that was tried: the reward drives them to infinity, or is -inf wherever "
            "they can go."
        )

    def _backwards(self) -> np.ndarray:
        """``w_k = v_k/alpha`` at the nodes, ``(K+1, N)``."""
        nodes, values, self._held = self._nodes, [self._nodes.reward], None
        self._out_nodes = np.flatnonzero(~nodes.inside)
        for k in reversed(range(self._wide.steps)):
            kernel, cost = self._kernel(k)
            now = nodes.reward.copy()
            now[self._out_nodes] = kernel.log_average(values[-1]) - cost
            values.append(now)
        return np.stack(values[::-1])

    @cached_property
    def _numbers(self) -> bool:
        """Whether rewards are numbers wherever the chain may end."""
        return bool(np.isfinite(self._nodes.reward).all())

    @cached_property
    def _shifted(self) -> tuple[np.ndarray, np.ndarray]:
        """Values of the best mean-shift chain at the nodes, ``(K+1, N)``, and its shifts, ``(K, N)``."""
        nodes, values, shifts, out = self._nodes, [self._nodes.reward], [], self._out_nodes
        for k in reversed(range(self._wide.steps)):
            now, c = nodes.reward.copy(), np.zeros_like(nodes.y)
            step = self._steps(nodes.y[out], k)
            c[out], best = self._best(step, values[-1], self._soft[k + 1])
            now[out] = best - step.cost
            values.append(now)
            shifts.append(c)
        return np.stack(values[::-1]), np.stack(shifts[::-1])

    def _shift_at(self, k: int) -> np.ndarray:
        """The shifts of step k at the nodes: the best ones, or where no reward allows any the mean shifts of the
        soft-optimal kernels."""
        if self._numbers:
            return self._shifted[1][k]
        c = np.zeros_like(self._nodes.y)
        c[self._out_nodes] = self._kernel(k)[0].mean_shift(self._soft[k + 1])
        return c

    def _between(self, values: np.ndarray, y: np.ndarray) -> np.ndarray:
        """From values at the nodes to those at any places: each panel's polynomial, held at the ends of the range."""
        panel = np.clip(np.searchsorted(self._ends, y, side="right") - 1, 0, len(self._ends) - 2)
        a, b = self._ends[panel], self._ends[panel + 1]
        t = np.clip((2 * y - a - b) / (b - a), -1.0, 1.0)
        points, _ = np.polynomial.legendre.leggauss(_ORDER)
        pieces = values.reshape(-1, _ORDER) @ np.linalg.inv(np.polynomial.legendre.legvander(points, _ORDER - 1)).T
        return (np.polynomial.legendre.legvander(t, _ORDER - 1) * pieces[panel]).sum(1)

    def _best(self, step: Steps, values: np.ndarray, soft: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The best shift c of each state's step and ``max_c E V(m + s (c + xi)) - c^2/2``, from the mean shift of the
        soft-optimal kernel on by Newton's method; from the best of many where there may be several maxima."""
        shift, best = [], []
        size = max(1, _HELD // len(self._nodes.y))
        for low in range(0, len(step.mean), size):
            part = Steps(*(v[low : low + size] for v in step))
            found = self._newton(part, values, Kernel(self._nodes, part.mean, part.scale).mean_shift(soft))
            if found[2]:
                candidates = np.stack([np.full(len(part.mean), c) for c in _SHIFTS])
                level = np.stack([self._derivatives(part, values, c)[0] - 0.5 * c * c for c in candidates])
                other = self._newton(part, values, candidates[level.argmax(0), np.arange(len(part.mean))])
                better = other[1] > found[1]
                found = np.where(better, other[0], found[0]), np.where(better, other[1], found[1]), True
            shift.append(found[0])
            best.append(found[1])
        return np.concatenate(shift), np.concatenate(best)

    def _derivatives(self, step: Steps, values: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, ...]:
        """``E V(m + s (c + xi))`` and its first two derivatives in c."""
        p = Kernel(self._nodes, step.mean + step.scale * c, step.scale).weights
        mean = p @ values
        z = (self._nodes.y - (p @ self._nodes.y)[:, None]) / step.scale[:, None]
        pz = p * z
        return mean, pz @ values, (pz * z) @ values - mean * (pz * z).sum(1)

    def _newton(self, step: Steps, values: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        rough = False
        for _ in range(30):
            _, first, second = self._derivatives(step, values, c)
            rough = rough or bool(second.max() > 0.5)
            change = ((first - c) / np.maximum(1.0 - second, 0.5)).clip(-2.0, 2.0)
            c = (c + change).clip(-30.0, 30.0)
            if np.abs(change).max() < 1e-11:
                break
        return c, self._derivatives(step, values, c)[0] - 0.5 * c * c, rough

    # ---------------------------------------------------------------- the interface

    def _values(self, y: np.ndarray, k: int) -> np.ndarray:
        """``w_k`` at any states."""
        reward, inside = self._reward(y), self._inside(y)
        if k == self._wide.steps:
            return reward
        step = self._steps(y, k)
        moved = Kernel(self._nodes, step.mean, step.scale).log_average(self._soft[k + 1])
        return np.where(inside, reward, moved - step.cost)

    def _value_at(self, x: States, time: float) -> PerPath:
        return self.problem.alpha * torch.from_numpy(self._values(x[:, 0].numpy(), self._state(time)))

    def _shift(self, x: Tensor, k: int) -> Tensor:
        y = x[:, 0].numpy()
        c = np.where(self._inside(y), 0.0, self._between(self._shifts_of(k), y))
        # along the noise that reaches the state, of several
        rows = self._functions.rows(self._functions.step(x, k)[1], [0], len(x))[:, 0]
        return torch.from_numpy(c).unsqueeze(1) * rows / rows.norm(dim=1, keepdim=True)

    def _control_at(self, x: States, time: float) -> Controls:
        k = self._step_at(time)
        return self._wide.control(k, self._shift(x, k))

    def _shift_function(self, chain: Chain) -> ShiftFunction:
        if chain is not self.chain:
            times = [self._snap(t) for t in chain.clock[:-1]]
            return lambda k, x, condition: chain.shift_at(
                k, x, self._control_at(x.to("cpu", torch.float64), times[k]).to(x)
            )
        return lambda k, x, condition: self._shift(x.to("cpu", torch.float64), k).to(x)

    def _start_average(self, values: np.ndarray, soft: bool) -> float:
        """``log E exp w(X_0)`` or ``E w(X_0)`` over the start."""
        mean, cov = self._first_moments()
        law = Kernel(self._nodes, mean.numpy().reshape(1), np.array([float(cov[0, 0]) ** 0.5]))
        if soft:
            return float(law.log_average(values)[0])
        p = law.weights[0]
        return float((p[p > 0] * values[p > 0]).sum())

    @cached_property
    def _point(self) -> np.ndarray | None:
        """The start, where it is a point."""
        law = self.problem.origin
        return law.mean.double().cpu().numpy().reshape(1) if isinstance(law, Dirac) else None

    def _start_value(self, soft: bool) -> float:
        if self._point is not None:
            return float(self._values(self._point, 0)[0])
        return self._start_average(self._soft[0], soft)

    @property
    def log_z(self) -> Scalar:
        return self._out(torch.tensor(self._start_value(soft=True), dtype=torch.float64))

    @property
    def start_log_z(self) -> Scalar:
        return self._out(torch.tensor(self._start_value(soft=False), dtype=torch.float64))

    @property
    def elbo(self) -> Scalar:
        if not self._numbers:
            return self._out(torch.tensor(-math.inf, dtype=torch.float64))
        values = self._shifted[0]
        if self._point is None:
            found = self._start_average(values[0], soft=False)
        else:
            step = self._steps(self._point, 0)
            found = float((self._best(step, values[1], self._soft[1])[1] - step.cost)[0])
        return self._out(torch.tensor(found, dtype=torch.float64))

    def marginal(self, t: float) -> Any:
        raise NoExactSolution("marginal(t), sample(n): the laws of a chain that stops are not computed; simulate.")

    def bridge(self, s: float, t: float, x_t: Tensor) -> Any:
        raise NoExactSolution("bridge(s, t, x_t): bridges of a chain that stops are not Gaussian, and not computed.")

    def _kernel_at(self, x: Tensor, k: int) -> Any:
        raise NoExactSolution("kernel(x, k): the kernels of a chain that stops are not computed; value is exact.")
