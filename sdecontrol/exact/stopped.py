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
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import NoExactSolution
from ..memory import Remembered
from .stopping import StoppedSolution

_ORDER = 10  # nodes of a panel
_WIDTH = 1.5  # of a panel, in standard deviations of the narrowest step
_MOST = 4000  # nodes
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


def _column(y: np.ndarray) -> Tensor:
    """Places as states ``(n, 1)``."""
    return torch.from_numpy(y)[:, None]


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


class StoppedChainSolution(StoppedSolution):
    """Exact solution of a one-dimensional chain with a region to stop in, or with a reward that is -inf somewhere, on
    panels of Gauss-Legendre nodes.

    ``control`` and ``elbo`` are the best mean-shift chain's where the reward is a number. Errors are those of rounding
    and of edges, about 1e-9.
    """

    kind = "panels"

    def _steps(self, y: np.ndarray, k: int) -> Steps:
        """Step k of the chain from states y, were it not stopped."""
        mean, rows, cost = self._step(_column(y), k)
        return Steps(mean[:, 0].numpy(), rows.norm(dim=(1, 2)).numpy(), cost)

    # ---------------------------------------------------------------- nodes

    def _kinds(self, y: np.ndarray) -> np.ndarray:
        """What changes at an edge: whether the state is inside, and whether its reward is a number."""
        return self._inside(_column(y)) + 2 * np.isfinite(self._reward(_column(y)))

    def _edges(self, low: float, high: float, width: float) -> np.ndarray:
        """Where the region, or the set where the reward is a number, begins or ends, or the reward jumps, by bisection
        between points half a panel apart."""
        y = np.linspace(low, high, int(2 * (high - low) / width) + 2)
        kinds, reward = self._kinds(y), np.nan_to_num(self._reward(_column(y)), neginf=0.0)
        span = np.ptp(reward) + 1e-300
        changes = np.flatnonzero((kinds[1:] != kinds[:-1]) | (np.abs(np.diff(reward)) > _JUMP * span))
        a, b = y[changes], y[changes + 1]
        sides = [[v[changes + i] for v in (kinds, reward)] for i in (0, 1)]
        while len(a) and float((b - a).max()) > _EDGE * (high - low):
            middle = 0.5 * (a + b)
            here = [self._kinds(middle), np.nan_to_num(self._reward(_column(middle)), neginf=0.0)]
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
        return Nodes(y, np.log((half * weights).ravel()), self._inside(_column(y)), self._reward(_column(y)))

    # ---------------------------------------------------------------- the recursion

    def _solve(self) -> None:
        self._shifts_of = Remembered(self._shift_at, self._wide.steps)
        (low,), (high,), (narrow,) = self._range()
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

    # ---------------------------------------------------------------- anywhere

    def _values(self, x: Tensor, k: int) -> np.ndarray:
        reward, inside = self._reward(x), self._inside(x)
        if k == self._wide.steps:
            return reward
        step = self._steps(x[:, 0].numpy(), k)
        moved = Kernel(self._nodes, step.mean, step.scale).log_average(self._soft[k + 1])
        return np.where(inside, reward, moved - step.cost)

    def _shift(self, x: Tensor, k: int) -> Tensor:
        c = np.where(self._inside(x), 0.0, self._between(self._shifts_of(k), x[:, 0].numpy()))
        rows = self._step(x, k).rows[:, 0]  # along the noise that reaches the state, of several
        return torch.from_numpy(c).unsqueeze(1) * rows / rows.norm(dim=1, keepdim=True)

    def _start_average(self, soft: bool) -> float:
        return self._averaged(self._soft[0], soft)

    def _averaged(self, values: np.ndarray, soft: bool) -> float:
        mean, cov = self._first_moments()
        law = Kernel(self._nodes, mean.numpy().reshape(1), np.array([float(cov[0, 0]) ** 0.5]))
        if soft:
            return float(law.log_average(values)[0])
        p = law.weights[0]
        return float((p[p > 0] * values[p > 0]).sum())

    def _reached(self) -> float:
        values = self._shifted[0]
        if self._point is None:
            return self._averaged(values[0], soft=False)
        step = self._steps(self._point[:, 0].numpy(), 0)
        return float((self._best(step, values[1], self._soft[1])[1] - step.cost)[0])
