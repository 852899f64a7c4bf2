"""Exact solutions on grids: problems that fall apart into blocks of one or two coordinates.

Where drift, noise, reward and running cost act coordinate by coordinate, ``v`` is a sum of functions of one coordinate each,
and equal coordinates share one. Nothing is declared: the functions are probed, and what depends on what is read off.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.build import chain_of
from ..chains.gaussian import EulerChain, TransitionChain
from ..chains.segments import LearnedStart, SegmentedChain
from ..chains.shifts import ShiftFunction
from ..errors import NoExactSolution
from ..problems.problem import ControlProblem
from ..processes.laws import Dirac, Gaussian, draw
from ..processes.sde import SDE
from ..tensors import apply_scale, apply_scale_transposed, is_matrix_scale
from .base import ExactSolution
from .grids import ChainGrid, ChainStep, Coefficients, ContinuousGrid, Grid, GridLaw, Table, chain_recursion

__all__ = ["GridChainSolution", "GridSolution"]

_PROBES = 8  # pairs of states between which dependence is looked for
_PAIRS = 64  # dimensions up to which it is found out which pairs of coordinates a reward couples
_MOMENTS = 17  # times at which it is looked for, ends included
_PATHS = 512  # that say where the process goes
_STEPS = 200  # of them in continuous time
_WATCHED = 40  # times at which they are looked at
_MARGIN_REFERENCE = 1.0  # of a grid beyond the reference's paths
_COUNTS = {1: (257, 513, 1025, 2049), 2: (33, 65, 97)}  # points of an axis, by dimension and refinement
_GOOD = {1: 1e-6, 2: 1e-4}  # error of u* on optimal paths at which refinement stops, in continuous time
_GOOD_CHAIN = 1e-8
_BAD = 1e-2  # relative error of u* above which there is no reference worth the name


class _Functions:
    """The problem's functions, and the steps of a chain, in float64 where they take it, at states ``(rows, d)``."""

    def __init__(self, problem: ControlProblem, chain: Chain) -> None:
        self.problem, self.chain = problem, chain
        self.d = problem.event_shape[0]
        self.eps = float(torch.finfo(torch.float64).eps)
        self._takes_float64: dict[str, bool] = {}

    def _call(self, name: str, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        dtype = torch.float64 if self._takes_float64.get(name, True) else self.problem.dtype
        with torch.no_grad(), self.problem.evaluating():
            try:
                value = function(x.to(device=self.problem.device, dtype=dtype))
            except (RuntimeError, TypeError):
                if dtype == self.problem.dtype or name in self._takes_float64:
                    raise
                self._takes_float64[name] = False  # a module of single precision: its rounding is that of the problem
                self.eps = max(self.eps, float(torch.finfo(self.problem.dtype).eps))
                value = function(x.to(device=self.problem.device, dtype=self.problem.dtype))
        self._takes_float64.setdefault(name, True)
        return value.detach().to("cpu", torch.float64)

    def _time(self, t: float, x: Tensor) -> Tensor:
        return torch.tensor(t, dtype=x.dtype, device=x.device)

    def reward(self, x: Tensor) -> Tensor:
        """``r/alpha``, ``(rows,)``."""
        value = self._call("reward", self.problem.reward, x)
        return value / self.problem.alpha

    def cost(self, x: Tensor, t: float) -> Tensor:
        """``f/alpha``, ``(rows,)``."""
        if self.problem.running_cost_function is None:
            return torch.zeros(len(x), dtype=torch.float64)
        value = self._call("running_cost", lambda y: self.problem.running_cost(y, self._time(t, y)), x)
        return value / self.problem.alpha

    def drift(self, x: Tensor, t: float) -> Tensor:
        return self._call("drift", lambda y: self.problem.reference.drift(y, self._time(t, y)), x)

    def diffusion(self, x: Tensor, t: float) -> Tensor:
        """sigma as the process has it."""
        reference: Any = self.problem.reference
        return self._call("diffusion", lambda y: reference.diffusion(y, self._time(t, y)), x)

    def step(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Mean ``(rows, d)`` of step k, and its scale as the chain has it."""
        both: list[Tensor] = []

        def kernel(y: Tensor) -> Tensor:
            mean, scale = self.chain.kernel(k, y)
            both.append(scale.detach().to("cpu", torch.float64))
            return mean

        mean = self._call("drift", kernel, x)
        return mean, both[-1]

    def rows(self, scale: Tensor, index: list[int], count: int) -> Tensor:
        """The rows of a scale that belong to a block, as matrices ``(count, n, m)`` (an elementwise one: m = n)."""
        if is_matrix_scale(scale, 1):
            return scale[:, index].expand(count, -1, -1)
        return torch.diag_embed(scale.expand(count, self.d)[:, index])


class ResidualBlock(NamedTuple):
    """Equal blocks of coordinates, e.g. ``[(3,), (4,)]``."""

    members: list[tuple[int, ...]]

    @property
    def dim(self) -> int:
        return len(self.members[0])


def _watched(count: int, most: int) -> list[int]:
    """At most ``most`` of the integers ``0 .. count - 1``, ends included."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


class _Separation:
    """Which coordinates act on each other, found by changing one coordinate at a time between probed states.

    Args:
        states: ``(2 * 8, d)`` to probe with.
    """

    def __init__(self, states: Tensor, functions: _Functions) -> None:
        self.d = states.shape[1]
        self.x, self.y = states[:_PROBES], states[_PROBES : 2 * _PROBES]
        self.functions = functions
        self.linked = np.eye(self.d, dtype=bool)
        self.reasons: dict[str, np.ndarray] = {}
        moved = self.x.repeat(self.d, 1, 1)
        for j in range(self.d):
            moved[j, :, j] = self.y[:, j]
        self.moved = moved  # (d, probes, d): coordinate j of state i replaced

    def _link(self, name: str, pairs: np.ndarray) -> None:
        np.fill_diagonal(pairs, False)
        if pairs.any():
            self.linked |= pairs | pairs.T
            self.reasons[name] = self.reasons.get(name, np.zeros_like(pairs)) | pairs | pairs.T

    def add_map(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        """``function (rows, d)``: its entry i must not depend on another block's coordinates."""
        base, changed = function(self.x), function(self.moved.flatten(0, 1)).unflatten(0, self.moved.shape[:2])
        size = torch.maximum(base.abs(), changed.abs()).amax((0, 1)) + 1e-300
        pairs = ((changed - base).abs().amax(1) > 256 * self.functions.eps * size).numpy()  # (j, i)
        self._link(name, pairs)

    def add_noise(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        """``function`` giving a scale, elementwise or ``(1 | rows, d, m)``: the same, and blocks have no noise in common."""
        base = function(self.x)
        if not is_matrix_scale(base, 1):
            self.add_map(name, lambda x: function(x).expand_as(x))
            return
        if base.shape[0] > 1:
            changes = torch.stack([(function(x) - base).abs().amax((0, 2)) for x in self.moved])  # (j, i)
            size = torch.cat((base, function(self.y))).abs().amax((0, 2)) + 1e-300
            self._link(name, (changes > 256 * self.functions.eps * size).numpy())
        used = (torch.cat((base, function(self.y))).abs().amax(0) > 0).numpy().astype(int)  # (d, m)
        self._link(name, used @ used.T > 0)

    def add_sum(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        """``function (rows,)`` must be a sum over blocks: mixed differences between them vanish."""
        base, whole = function(self.x), function(self.y)
        single = function(self.moved.flatten(0, 1)).unflatten(0, self.moved.shape[:2])  # (d, probes)
        size = base.abs() + whole.abs() + (single - base).abs().sum(0) + base.abs() * self.d
        tolerance = 256 * self.functions.eps * size + 1e-300
        if bool(((whole - base - (single - base).sum(0)).abs() <= tolerance).all()):
            return
        if self.d > _PAIRS:
            raise NoExactSolution(
                f"{name}: no exact solution is known, since it is not a sum of functions of one coordinate each (in more than "
                f"{_PAIRS} dimensions, smaller blocks are not looked for)."
            )
        pairs = np.zeros((self.d, self.d), dtype=bool)
        for i, j in itertools.combinations(range(self.d), 2):
            both = self.x.clone()
            both[:, [i, j]] = self.y[:, [i, j]]
            mixed = function(both) - single[i] - single[j] + base
            pairs[i, j] = bool((mixed.abs() > tolerance).any())
        self._link(name, pairs if pairs.any() else np.ones((self.d, self.d), dtype=bool))

    def blocks(self) -> list[tuple[int, ...]]:
        """The connected components.

        Raises:
            NoExactSolution: one has more than two coordinates, naming them and what couples them.
        """
        from scipy.sparse.csgraph import connected_components

        count, label = connected_components(self.linked, directed=False)
        found = [tuple(int(i) for i in np.flatnonzero(label == c)) for c in range(count)]
        for block in found:
            if len(block) > 2:
                why = [name for name, pairs in self.reasons.items() if pairs[np.ix_(block, block)].any()]
                names = ", ".join(map(str, block[:6])) + (", ..." if len(block) > 6 else "")
                raise NoExactSolution(
                    f"{' and '.join(why)}: no exact solution is known. Coordinates {names} act on each other through "
                    f"the {' and the '.join(why)}, and grids are for blocks of one or two coordinates."
                )
        return found


class _OnGrids(ExactSolution):
    """What grid solutions of processes and of chains share.

    Attributes:
        error: estimated root mean square error of u* on optimal paths at its worst time, from the last refinement of the grids.
        bounds: ``(d, 2)``, where the grids are. Outside, value and control are those at the nearest point.
    """

    error: float = math.nan
    _margin = 2.5  # of a grid beyond the optimal paths
    _solved: list[Any]

    def __init__(self, problem: ControlProblem, settings: dict[str, Any], chain: Chain | None, sketch: Chain) -> None:
        super().__init__(problem, settings, chain)
        self._functions = _Functions(problem, sketch)
        self._sketch = sketch  # a float64 chain on which paths say where the process goes
        self._base, probes, self._lows, self._highs = self._look_around()
        separation = _Separation(probes, self._functions)
        self._add_dependences(separation)
        self._blocks = self._group(separation.blocks())
        self._refine()

    # ---------------------------------------------------------------- where the process goes

    def _walk(self, slopes: Callable[[int, Tensor], Tensor] | None) -> Iterator[tuple[int, Tensor]]:
        """States of a few paths, of the reference or with ``c = scale' slope``, at the watched steps."""
        problem, chain = self.problem, self._sketch
        generator = torch.Generator().manual_seed(0)
        x = draw(Dirac(problem.initial.mean) if problem.start == "controlled" else problem.initial, _PATHS, 0)
        x = x.to("cpu", torch.float64)
        watched = set(_watched(chain.steps + 1, _WATCHED))
        for k in range(chain.steps):
            if k in watched:
                yield k, x
            mean, scale = self._functions.step(x, k)
            xi = torch.randn(len(x), chain.noise_shape[0], generator=generator, dtype=torch.float64)
            if slopes is not None:
                xi = xi + apply_scale_transposed(scale, slopes(k, x), 1)
            x = mean + apply_scale(scale, xi, 1)
            x = x[torch.isfinite(x).all(1)]
            if len(x) < _PATHS // 2:
                raise NoExactSolution("drift: most paths run to infinity, so there is no grid to solve on.")
        yield chain.steps, x

    @staticmethod
    def _reach(x: Tensor, margin: float) -> tuple[np.ndarray, np.ndarray]:
        """The middle 99 % and a margin on both sides, ``(d,)`` each; for a Gaussian 2.6 + 1.6 margin standard deviations."""
        n = len(x)
        ordered = x.sort(0).values
        q = [ordered[min(int(p * n), n - 1)] for p in (0.005, 0.16, 0.84, 0.995)]
        return (q[0] - margin * (q[1] - q[0])).numpy(), (q[3] + margin * (q[3] - q[2])).numpy()

    def _look_around(self) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
        """A state, states to probe with, and the range of the reference's paths."""
        seen, ends = [], []
        for _, x in self._walk(None):
            seen.append(x)
            ends.append(self._reach(x, _MARGIN_REFERENCE))
        lows, highs = (np.array(side) for side in zip(*ends))
        lows, highs = lows.min(0), highs.max(0)
        if not (highs > lows).all():
            still = np.flatnonzero(~(highs > lows)).tolist()
            raise NoExactSolution(f"diffusion: coordinates {still} have no noise and do not move; grids need both.")
        generator = torch.Generator().manual_seed(1)
        uniform = torch.rand(_PROBES, len(lows), generator=generator, dtype=torch.float64)
        wide = torch.from_numpy(lows) + torch.from_numpy(highs - lows) * uniform
        middle, end = seen[len(seen) // 2], seen[-1]
        probes = torch.cat((middle[: _PROBES // 2], wide[: _PROBES // 2], wide[_PROBES // 2 :], end[: _PROBES // 2]))
        # equal coordinates get equal base values, so that their parts of a sum are equal
        own = end.median(0).values
        common = own.median().expand_as(own)
        inside = (common > torch.from_numpy(lows)) & (common < torch.from_numpy(highs))
        return torch.where(inside, common, own), probes, lows, highs

    # ---------------------------------------------------------------- blocks

    def _add_dependences(self, separation: _Separation) -> None:
        raise NotImplementedError

    def _signature(self, x: Tensor, members: tuple[int, ...]) -> list[Tensor]:
        """What tells a block from another: its functions at states that differ from the base in it only."""
        raise NotImplementedError

    def _group(self, blocks: list[tuple[int, ...]]) -> list[ResidualBlock]:
        self._parts = len(blocks)
        singles = [b for b in blocks if len(b) == 1]
        groups = [ResidualBlock([b]) for b in blocks if len(b) > 1]
        coordinates = [b[0] for b in singles]
        if not coordinates:
            return groups
        low, high = self._lows[coordinates].min(), self._highs[coordinates].max()
        z = torch.from_numpy(low + (high - low) * (0.5 + 0.5 * np.cos(np.linspace(0.1, 3.0, 23))))[:, None]
        made: list[tuple[list[Tensor], ResidualBlock]] = []
        for member in singles:
            own = self._signature(self._at(z, member), member)
            for theirs, block in made:
                if all(
                    bool(((a - b).abs() <= 64 * self._functions.eps * self._parts * (a.abs() + a.abs().max())).all())
                    for a, b in zip(own, theirs)
                ):
                    block.members.append(member)
                    break
            else:
                made.append((own, ResidualBlock([member])))
        return groups + [block for _, block in made]

    def _at(self, points: Tensor, member: tuple[int, ...]) -> Tensor:
        """States ``(N, d)`` that are the base but for one block's coordinates ``(N, n)``."""
        x = self._base.repeat(len(points), 1)
        x[:, list(member)] = points
        return x

    def _share(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """One block's part of a sum over blocks, at states that are the base in the others."""
        return function(x) - (self._parts - 1) / self._parts * function(self._base[None])

    # ---------------------------------------------------------------- grids

    def _solve(self, block: ResidualBlock, grid: Grid, refinement: int) -> Any:
        raise NotImplementedError

    def _slope_tables(self, solved: Any, k: int) -> Table:
        """Of one block: the n functions with ``c = scale' slope`` at step k of the sketch."""
        raise NotImplementedError

    def _slopes(self, k: int, x: Tensor, solved: list[Any]) -> Tensor:
        out = torch.empty_like(x)
        for block, one in zip(self._blocks, solved):
            index = torch.tensor(block.members)
            out[:, index] = self._slope_tables(one, k)(x[:, index]).movedim(0, -1)
        return out

    def _axes(self, block: ResidualBlock, widen: float) -> tuple[np.ndarray, np.ndarray]:
        index = np.array(block.members)
        low, high = self._lows[index].min(0), self._highs[index].max(0)
        return low - widen * (high - low), high + widen * (high - low)

    def _refine(self) -> None:
        """Solve, see where optimal paths go, widen the grids until they stay inside, and halve them until u* stands still."""
        solved: list[Any] = []
        walked: list[tuple[int, Tensor]] = []
        for _ in range(8):
            solved = [self._solve(b, Grid(*self._axes(b, 0.0), _COUNTS[b.dim][0]), 0) for b in self._blocks]
            walked = list(self._walk(lambda k, x, s=solved: self._slopes(k, x, s)))
            lows, highs = (np.array(side) for side in zip(*(self._reach(x, self._margin) for _, x in walked)))
            lows, highs = lows.min(0), highs.max(0)
            slack = 0.05 * (self._highs - self._lows)
            inside = bool((lows > self._lows - slack).all() and (highs < self._highs + slack).all())
            self._lows, self._highs = np.minimum(self._lows, lows), np.maximum(self._highs, highs)
            if inside:
                break
        else:
            raise NoExactSolution(
                "optimal paths leave every grid: the reward drives them to infinity, or the noise there is too strong. Use a "
                "bounded reward or a larger alpha."
            )
        visited = [(k, x, self._functions.step(x, k)[1] / self._sketch.step_sizes[k] ** 0.5) for k, x in walked[:-1]]
        errors = [math.inf] * len(self._blocks)
        size = 0.0
        for level in range(1, max(len(c) for c in _COUNTS.values())):
            for i, block in enumerate(self._blocks):
                counts = _COUNTS[block.dim]
                if errors[i] <= self._good(block.dim) or level >= len(counts):
                    continue
                finer = self._solve(block, Grid(*self._axes(block, 0.05 * level), counts[level]), level)
                squares: list[Tensor] = []
                for k, x, root in visited:
                    for member in block.members[:2]:
                        index = list(member)
                        rows = self._functions.rows(root, index, len(x))
                        old, new = (self._slope_tables(one, k)(x[:, index]).mT for one in (solved[i], finer))
                        squares.append(((new - old).unsqueeze(1) @ rows).square().sum(-1).mean())
                        size = max(size, float((new.unsqueeze(1) @ rows).norm(dim=-1).max()))
                errors[i] = float(torch.stack(squares).max().sqrt())
                ratio = (counts[level] - 1) / (counts[level - 1] - 1)
                errors[i] /= (
                    ratio**4 - 1
                )  # the error left, if it falls with the fourth power at least (smooth: the sixth)
                solved[i] = finer
        self._solved, self.error = solved, max(errors)
        if not self.error <= _BAD * max(size, 1.0):
            raise NoExactSolution(
                f"no grid resolves this problem: the error of u* is still about {self.error:.2g} (largest |u*|: {size:.2g}). "
                "A reward with jumps, or a time scale far below the step of the grid, does that."
            )

    def _good(self, dim: int) -> float:
        raise NotImplementedError

    def _check(self, lowest: float, bias: float) -> None:
        """The mean log weight of paths that are simulated with the control (from a point) is J/alpha: compare it with the grids'.

        Raises:
            NoExactSolution: they disagree, by more than five standard errors and ``bias``.
        """
        f, chain, problem = self._functions, self._sketch, self.problem
        generator = torch.Generator().manual_seed(2)
        x = draw(Dirac(problem.initial.mean) if problem.start == "controlled" else problem.initial, _PATHS, 1)
        x = x.to("cpu", torch.float64)
        log_w = torch.zeros(len(x), dtype=torch.float64)
        for k in range(chain.steps):
            mean, scale = f.step(x, k)
            c = apply_scale_transposed(scale, self._slopes(k, x, self._solved), 1)
            xi = torch.randn(c.shape, generator=generator, dtype=torch.float64)
            log_w -= (c * xi).sum(1) + 0.5 * (c * c).sum(1)
            if chain.clock[k] >= 0:
                log_w -= chain.step_sizes[k] * f.cost(x, chain.clock[k])
            x = mean + apply_scale(scale, c + xi, 1)
        log_w += f.reward(x)
        apart = abs(float(log_w.mean()) - lowest)
        if not apart <= 5 * float(log_w.std()) / len(log_w) ** 0.5 + bias * (1 + abs(lowest)):
            raise NoExactSolution(
                f"no grid resolves this problem: simulated with its control, paths have a mean log weight of {float(log_w.mean()):.4g}, "
                f"where the grids say {lowest:.4g}. Steps that are too large for the drift or the reward do that."
            )

    @property
    def bounds(self) -> Tensor:
        return self._out(torch.from_numpy(np.stack([self._lows, self._highs], 1)))

    # ---------------------------------------------------------------- the interface

    def _sum_tables(self, x: Tensor, tables: list[Table]) -> Tensor:
        """Sum over all coordinates of the blocks' functions, ``(rows,)``."""
        total = torch.zeros(len(x), dtype=torch.float64)
        for block, table in zip(self._blocks, tables):
            total = total + table(x[:, torch.tensor(block.members)])[0].sum(1)
        return total

    def _over_start(self, tables: list[Table], soft: bool) -> Tensor:
        """``log E exp w(X_0)`` or ``E w(X_0)`` over the first state."""
        law = self.problem.initial
        if isinstance(law, Dirac) or self.problem.start == "controlled":
            return self._sum_tables(law.mean.detach().to("cpu", torch.float64)[None], tables)[0]
        if not isinstance(law, Gaussian):
            raise NoExactSolution(
                f"this quantity depends on the start, and it is not known for a {type(law).__name__} start; use Dirac or "
                "Gaussian. (value and control are exact.)"
            )
        mean, cov = (v.detach().to("cpu", torch.float64) for v in (law.mean, law.covariance_matrix))
        self._check_start(cov)
        total = torch.zeros((), dtype=torch.float64)
        z = torch.arange(-12.0, 12.01, 0.125, dtype=torch.float64)
        for block, table in zip(self._blocks, tables):
            for member in block.members:
                index = list(member)
                own = cov[index][:, index]
                values, vectors = torch.linalg.eigh(own)
                root = vectors * values.clamp(min=0).sqrt()
                nodes = z[:, None] if block.dim == 1 else torch.cartesian_prod(z[::2], z[::2])
                log_p = (-0.5 * (nodes**2).sum(1)).log_softmax(0)
                w = table(mean[index] + nodes @ root.mT)[0]
                total = total + ((log_p + w).logsumexp(0) if soft else (log_p.exp() * w).sum())
        return total

    def _check_start(self, cov: Tensor) -> None:
        block_of = {i: member for block in self._blocks for member in block.members for i in member}
        for i, j in (cov != 0).nonzero().tolist():
            if block_of[i] != block_of[j]:
                raise NoExactSolution(
                    f"initial: the covariance of the start couples coordinates {i} and {j}, which the process does not; this "
                    "quantity is known for independent blocks only. (value and control are exact.)"
                )

    @property
    def initial(self) -> Any:
        return self.marginal(0.0) if self.problem.start == "controlled" else self.problem.initial

    def bridge(self, s: float, t: float, x_t: Tensor) -> Gaussian:
        raise NoExactSolution("bridge(s, t, x_t): bridges are not Gaussian here, and are not computed on grids.")

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, error of u* about {self.error:.1g})"


class GridSolution(_OnGrids):
    """Exact solution in continuous time of a problem that falls apart into blocks of one or two coordinates.

    ``u* = sigma' grad w``, w on a grid for each distinct block (:class:`ContinuousGrid`); equal coordinates share one. The
    grids are refined until ``error``, the estimated error of u* on optimal paths, is below 1e-6 (blocks of two: 1e-4, or
    what 97 x 97 points give). ``marginal``, ``bridge`` and ``sample`` are not known: simulate with ``control``.
    """

    kind = "grids"

    def __init__(self, problem: ControlProblem) -> None:
        self._stretch = problem.start == "controlled"
        if self._stretch and not isinstance(problem.initial, Gaussian):
            raise NoExactSolution(
                f"initial: a controlled {type(problem.initial).__name__} start has no exact solution on a grid in continuous "
                "time; use a Gaussian start."
            )
        self._tables = lru_cache(maxsize=1024)(self._make_tables)
        super().__init__(problem, {}, None, _float64_chain(problem, problem.chain(_STEPS, "euler")))
        if isinstance(problem.initial, Dirac) or self._stretch:
            self._check(float(self.elbo), 0.1)  # the sketch is a chain, so its J is biased

    def _times(self) -> list[float]:
        return (0.5 * self.problem.horizon * (1 - np.cos(np.linspace(0, np.pi, _MOMENTS)))).tolist()

    def _add_dependences(self, separation: _Separation) -> None:
        f = self._functions
        separation.add_sum("reward", f.reward)
        for t in self._times():
            separation.add_map("drift", lambda x, t=t: f.drift(x, t))
            separation.add_noise("diffusion", lambda x, t=t: f.diffusion(x, t))
            separation.add_sum("running_cost", lambda x, t=t: f.cost(x, t))
        if self._stretch:
            root = self._start_root()
            separation.add_noise("initial law", lambda x: root[None])
        same = [[function(separation.x, t) for function in (f.drift, f.diffusion, f.cost)] for t in self._times()]
        self._autonomous = all(torch.equal(a, b) for parts in same[1:] for a, b in zip(parts, same[0]))

    def _start_root(self) -> Tensor:
        root = self.problem.initial.scale_root.detach().to("cpu", torch.float64)
        return root if root.ndim == 2 else torch.diag(root)

    def _signature(self, x: Tensor, member: tuple[int, ...]) -> list[Tensor]:
        f, i = self._functions, member[0]
        out = [self._share(f.reward, x)]
        for t in self._times():
            out += [
                f.drift(x, t)[:, i],
                f.rows(f.diffusion(x, t), [i], len(x)).norm(dim=(1, 2)),
                self._share(lambda y, t=t: f.cost(y, t), x),
            ]
        return out if not self._stretch else [*out, self._start_root()[i].norm().expand(len(x))]

    def _solve(self, block: ResidualBlock, grid: Grid, refinement: int) -> list[tuple[float, ContinuousGrid]]:
        member, f = block.members[0], self._functions
        index = list(member)
        x = self._at(torch.from_numpy(grid.points), member)

        def coefficients(t: float) -> Coefficients:
            cost = self._share(lambda y: f.cost(y, t), x)
            return Coefficients(
                f.drift(x, t)[:, index].numpy(), f.rows(f.diffusion(x, t), index, len(x)).numpy(), cost.numpy()
            )

        end = _finite(self._share(f.reward, x), grid, "reward")
        main = ContinuousGrid(grid, coefficients, end, (0.0, self.problem.horizon), self._autonomous)
        if not self._stretch:
            return [(0.0, main)]
        root = self._start_root()[index].expand(len(x), -1, -1).numpy()
        still = Coefficients(np.zeros_like(grid.points), root, np.zeros(len(x)))
        return [(-1.0, ContinuousGrid(grid, lambda t: still, main.at(0.0), (-1.0, 0.0), True)), (0.0, main)]

    def _make_tables(self, time: float) -> list[Table]:
        """Of each block at a time: w and its gradient."""
        return [self._table(solved, time) for solved in self._solved]

    @staticmethod
    def _table(solved: list[tuple[float, ContinuousGrid]], time: float) -> Table:
        piece = [grid for first, grid in solved if first <= time][-1]
        return piece.grid.table(piece.tables(time))

    def _slope_tables(self, solved: Any, k: int) -> Table:
        table = self._table(solved, self._sketch.clock[k])
        return Table(table.values[1:], table.lows, table.spacings)

    def _good(self, dim: int) -> float:
        return _GOOD[dim]

    def _gradient(self, x: Tensor, time: float) -> Tensor:
        out = torch.empty_like(x)
        for block, table in zip(self._blocks, self._tables(time)):
            index = torch.tensor(block.members, device=x.device)
            out[:, index] = Table(table.values[1:], table.lows, table.spacings)(x[:, index]).movedim(0, -1)
        return out

    def _value_at(self, x: Tensor, time: float) -> Tensor:
        return self.problem.alpha * self._sum_tables(x, self._tables(time))

    def _control_at(self, x: Tensor, time: float) -> Tensor:
        root = self._start_root()[None] if time < 0 else self._functions.diffusion(x, time)
        return apply_scale_transposed(root, self._gradient(x, time), 1)

    def _shift_function(self, chain: Chain) -> ShiftFunction:
        times = [self._snap(t) for t in chain.clock[:-1]]

        def shift(k: int, x: Tensor, condition: Any) -> Tensor:
            return chain.shift(k, self._control_at(x.to("cpu", torch.float64), times[k]).to(x))

        return shift

    @property
    def log_z(self) -> Tensor:
        return self._out(self._over_start(self._tables(self._marks[0]), True))

    @property
    def start_log_z(self) -> Tensor:
        return self._out(self._over_start(self._tables(self._marks[0]), False))

    @property
    def elbo(self) -> Tensor:
        return self.start_log_z

    def marginal(self, t: float) -> Any:
        if self._snap(float(t)) == 0.0 and not self._stretch:
            return self.problem.initial
        raise NoExactSolution(
            "marginal(t), sample(n): the laws are not computed on grids in continuous time; simulate with control, or ask "
            "for the laws of a chain, exact_solution(problem, time_steps=K)."
        )


class GridChainSolution(_OnGrids):
    """Exact solution of the chain of a problem that falls apart into single coordinates (error of u* about 1e-8).

    ``value``, ``log_z``, ``kernel``, ``marginal`` and ``sample`` are those of the soft-optimal chain p*; ``control``, ``elbo`` and
    ``floor`` those of the best mean-shift chain. A time is matched to the grid of times within 1e-9 of the horizon, else it
    means the step that contains it. :class:`GridLaw` is what laws are.
    """

    kind = "grids"
    _margin = 3.5  # more, since more digits are promised

    def __init__(self, problem: ControlProblem, chain: Chain, settings: dict[str, Any]) -> None:
        for k in range(chain.steps):
            gain = chain.gain(k)
            if isinstance(gain, Tensor) and int(torch.linalg.matrix_rank(gain.double())) < gain.shape[0]:
                raise NoExactSolution(
                    "time_steps: the controls of this scheme do not reach all of its noise, and the best mean-shift chain is "
                    "then not known on grids; use scheme='euler'."
                )
        super().__init__(problem, settings, chain, _float64_chain(problem, chain))
        self.chain: Chain = chain
        if isinstance(problem.initial, Dirac) or problem.start == "controlled":
            self._check(float(self.elbo), 1e-6)

    def _add_dependences(self, separation: _Separation) -> None:
        f, clock = self._functions, self._sketch.clock
        separation.add_sum("reward", f.reward)
        for k in _watched(self._sketch.steps, _MOMENTS):
            separation.add_map("drift", lambda x, k=k: f.step(x, k)[0])
            separation.add_noise("diffusion", lambda x, k=k: f.step(x, k)[1])
            if clock[k] >= 0:
                separation.add_sum("running_cost", lambda x, k=k: f.cost(x, clock[k]))

    def _group(self, blocks: list[tuple[int, ...]]) -> list[ResidualBlock]:
        wide = next((b for b in blocks if len(b) > 1), None)
        if wide is not None:
            raise NoExactSolution(
                f"time_steps: coordinates {wide[0]} and {wide[1]} act on each other, and chains are solved in single coordinates "
                "only; leave time_steps and like out for the solution in continuous time."
            )
        return super()._group(blocks)

    def _step(self, x: Tensor, member: tuple[int, ...], k: int) -> ChainStep:
        mean, scale = self._functions.step(x, k)
        scale = self._functions.rows(scale, list(member), len(x)).norm(dim=(1, 2)).numpy()
        cost = torch.zeros(len(x), dtype=torch.float64)
        if self._sketch.clock[k] >= 0:
            cost = self._sketch.step_sizes[k] * self._share(lambda y: self._functions.cost(y, self._sketch.clock[k]), x)
        return ChainStep(mean[:, member[0]].numpy(), scale, cost.numpy())

    def _signature(self, x: Tensor, member: tuple[int, ...]) -> list[Tensor]:
        out = [self._share(self._functions.reward, x)]
        for k in _watched(self._sketch.steps, _MOMENTS):
            out += [torch.from_numpy(part) for part in self._step(x, member, k)]
        return out

    def _solve(self, block: ResidualBlock, grid: Grid, refinement: int) -> ChainGrid:
        member = block.members[0]
        x = self._at(torch.from_numpy(grid.points), member)
        end = _finite(self._share(self._functions.reward, x), grid, "reward")
        return chain_recursion(grid, lambda k: self._step(x, member, k), self._sketch.steps, end, refinement)

    def _slope_tables(self, solved: Any, k: int) -> Table:
        return solved.grid.table(solved.slopes[k])

    def _good(self, dim: int) -> float:
        return _GOOD_CHAIN

    def _state(self, time: float) -> int:
        """Index of the state at a (snapped) time: on the grid, or the left end of the step that contains it."""
        return max(sum(t <= time for t in self.chain.clock) - 1, 0)

    def _soft_tables(self, k: int) -> list[Table]:
        return [one.grid.table(one.soft[k]) for one in self._solved]

    def _value_at(self, x: Tensor, time: float) -> Tensor:
        return self.problem.alpha * self._sum_tables(x, self._soft_tables(self._state(time)))

    def _own_shift(self, k: int, x: Tensor) -> Tensor:
        return apply_scale_transposed(self._functions.step(x, k)[1], self._slopes(k, x, self._solved), 1)

    def _control_at(self, x: Tensor, time: float) -> Tensor:
        k = min(self._state(time), self.chain.steps - 1)
        return self._sketch.control(k, self._own_shift(k, x))

    def _shift_function(self, chain: Chain) -> ShiftFunction:
        if chain is self.chain:
            return lambda k, x, condition: self._own_shift(k, x.to("cpu", torch.float64)).to(x)
        times = [self._snap(t) for t in chain.clock[:-1]]
        return lambda k, x, condition: chain.shift(k, self._control_at(x.to("cpu", torch.float64), times[k]).to(x))

    @property
    def log_z(self) -> Tensor:
        return self._out(self._over_start(self._soft_tables(0), True))

    @property
    def start_log_z(self) -> Tensor:
        return self._out(self._over_start(self._soft_tables(0), False))

    @property
    def elbo(self) -> Tensor:
        return self._out(self._over_start([one.grid.table(one.shifted[0]) for one in self._solved], False))

    @property
    def floor(self) -> Tensor:
        gap = [one.grid.table(one.soft[0] - one.shifted[0]) for one in self._solved]
        return self._out(self._over_start(gap, False))

    # ---------------------------------------------------------------- laws

    def kernel(self, x: Tensor, k: int) -> Any:  # a GridLaw where the base has Gaussians
        if not 0 <= k < self.chain.steps:
            raise ValueError(f"k must be a step from 0 to {self.chain.steps - 1}, got {k}.")
        states = self._in("x", x)
        densities: dict[int, Tensor] = {}
        for block, one in zip(self._blocks, self._solved):
            for (i,) in block.members:
                made = torch.from_numpy(one.optimal_kernel(k, states[..., i].reshape(-1).numpy()))
                densities[i] = made.reshape(*states.shape[:-1], -1)
        return self._law(densities)

    def _law(self, densities: dict[int, Tensor]) -> GridLaw:
        grid_of = {i: one for block, one in zip(self._blocks, self._solved) for (i,) in block.members}
        order = sorted(densities)
        return GridLaw(
            [float(grid_of[i].grid.lows[0]) for i in order],
            [float(grid_of[i].grid.spacings[0]) * grid_of[i].stride for i in order],
            [densities[i] for i in order],
            torch.zeros((), dtype=self.problem.dtype, device=self.problem.device),
        )

    @cached_property
    def _marginals(self) -> dict[int, list[Tensor]]:
        """Of each coordinate: the densities of ``x_1 .. x_K`` under p*."""
        law = self.problem.initial
        if not isinstance(law, (Dirac, Gaussian)):
            raise NoExactSolution(
                f"marginal(t), sample(n): not known for a {type(law).__name__} start; use Dirac or Gaussian."
            )
        point = isinstance(law, Dirac) or self.problem.start == "controlled"
        mean, cov = (v.detach().to("cpu", torch.float64) for v in (law.mean, law.covariance_matrix))
        if not point:
            self._check_start(cov)
        out: dict[int, list[Tensor]] = {}
        for block, one in zip(self._blocks, self._solved):
            x, dx = one.grid.points[:: one.stride, 0], float(one.grid.spacings[0]) * one.stride
            now = np.stack(
                [
                    one.optimal_kernel(0, mean[[i]].numpy())[0]
                    if point or not cov[i, i]
                    else np.exp(-0.5 * (x - float(mean[i])) ** 2 / float(cov[i, i]))
                    for (i,) in block.members
                ]
            )
            random = [not (point or not cov[i, i]) for (i,) in block.members]
            laws = []
            for k in range(len(one.steps)):
                if k or any(random):
                    kernel = one.optimal_kernel(k, x)
                    moved = now @ kernel * dx
                    now = moved if k else np.where(np.array(random)[:, None], moved, now)
                now = now / (now.sum(1, keepdims=True) * dx)
                laws.append(torch.from_numpy(now))
            for row, (i,) in enumerate(block.members):
                out[i] = [law[row] for law in laws]
        return out

    def marginal(self, t: float) -> Any:
        k = self._state(self._snap(float(t)))
        if k == 0:
            return Dirac(self.problem.initial.mean) if self.problem.start == "controlled" else self.problem.initial
        return self._law({i: laws[k - 1] for i, laws in self._marginals.items()})


def _float64_chain(problem: ControlProblem, chain: Chain) -> Chain:
    """The same chain in float64."""
    if chain.start:
        return SegmentedChain(*(_float64_chain(problem, segment) for segment in chain.segments))
    if isinstance(chain, LearnedStart):
        return LearnedStart(chain.law, chain.steps, torch.float64, problem.device)
    scheme = (
        "euler" if isinstance(chain, EulerChain) else "exact" if isinstance(chain, TransitionChain) else "exponential"
    )
    assert isinstance(problem.reference, SDE)
    return chain_of(problem.reference, chain.clock, scheme, torch.float64, problem.device)


def _finite(values: Tensor, grid: Grid, name: str) -> np.ndarray:
    if not bool(torch.isfinite(values).all()):
        at = grid.points[int((~torch.isfinite(values)).nonzero()[0])]
        raise NoExactSolution(f"{name} is not finite at {np.array2string(at, precision=3)}, where the grid needs it.")
    return values.numpy()
