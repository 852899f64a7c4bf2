"""What exact solutions on grids share, of processes and of chains: problems that fall apart into blocks of one or two
coordinates.

Where drift, noise, reward and running cost act block by block, ``v`` is a sum of functions of one block each, and equal
blocks share one. The functions are probed for that (``interactions.py``), and paths say where the grids must be.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.shifts import ShiftFunction
from ..errors import NoExactSolution
from ..memory import Remembered
from ..problems.problem import ControlProblem
from ..processes.laws import Gaussian, draw
from ..randomness import Place, generator_for
from ..shapes import Controls, PerPath, Scalar, States
from ..tensors import apply_scale, apply_scale_transposed
from .base import ExactSolution
from .grids import Grid, Table
from .probing import PROBES, Block, Functions, Interactions, watched

_PATHS = 512  # that say where the process goes
_AWAY = 1e6  # times as far as the median of paths
_WATCHED = 40  # times at which they are looked at
_MARGIN_REFERENCE = 1.0  # of a grid beyond the reference's paths
COUNTS = {1: (257, 513, 1025, 2049), 2: (33, 65, 97)}  # points of an axis, by dimension and refinement
_DOUBLINGS = 4  # of a grid's width at most
_BAD = 1e-2  # relative error of u* above which there is no reference worth the name


class OnGrids(ExactSolution):
    """Values on a grid for each distinct block. A subclass says how one block is solved, and what the process does in
    it.

    Attributes:
        error: estimated root mean square error of u* on optimal paths at its worst time, from the last refinement of
            the grids.
        bounds: ``(d, 2)``, where the grids are. Outside, value and control are those at the nearest point.
    """

    kind = "grids"
    error: float = math.nan
    _margin: dict[int, float]  #: of a grid beyond the optimal paths, by a block's dimension
    _good: dict[int, float]  #: error of u* at which refinement stops, by a block's dimension
    _bias: float  #: relative error of J that the sketch's steps may make
    _counts: dict[int, tuple[int, ...]] = COUNTS  #: points of an axis, by a block's dimension
    #: nats by which values at the start may change as a grid is made twice as wide, by a block's dimension: where it
    #: is asked. Paths that say where a grid must be do not know of rare ways far out.
    _still: dict[int, float] = {}  # noqa: RUF012
    _times: list[float]  #: at which it is looked for what depends on what

    def __init__(self, problem: ControlProblem, settings: dict[str, Any], chain: Chain | None, sketch: Chain) -> None:
        super().__init__(problem, settings, chain)
        self._functions = f = Functions(problem, sketch)
        self._sketch = sketch  # a float64 chain on which paths say where the process goes
        self._base, self._probes, self._lows, self._highs = self._look_around()
        self._wider = np.ones(len(self._lows), dtype=int)  # than where paths go, in each coordinate
        self._solved: list[Any] = []
        self._value_tables = Remembered(self._all_values, 1024)
        self._slope_tables = Remembered(self._all_slopes, 1024)
        found = Interactions(self._probes, f)
        found.add_sum("reward", f.reward)
        for t in self._times:
            drift, noise = ("drift", "diffusion") if t >= 0 else ("initial law", "initial law")
            found.add_map(drift, lambda x, t=t: self._drift(x, t))
            found.add_noise(noise, lambda x, t=t: self._noise(x, t))
            found.add_sum("running_cost", lambda x, t=t: f.cost(x, t))
        self.blocks = self._group(found.blocks())
        self._refine()
        if problem.from_point:
            self._check(float(self.elbo))

    # ---------------------------------------------------------------- what a process or a chain says

    def _drift(self, x: Tensor, time: float) -> Tensor:
        """Drift, or mean of the step, at ``x (rows, d)``."""
        raise NotImplementedError

    def _noise(self, x: Tensor, time: float) -> Tensor:
        """The scale of the noise."""
        raise NotImplementedError

    def _solve(self, member: tuple[int, ...], x: Tensor, end: np.ndarray, grid: Grid, refinement: int) -> Any:
        """One block on a grid: x its states ``(N, d)``, end ``r/alpha`` there."""
        raise NotImplementedError

    def _value_table(self, one: Any, time: float) -> Table:
        """Of a solved block: its part of ``v(., time)/alpha``."""
        raise NotImplementedError

    def _slope_table(self, one: Any, time: float) -> Table:
        """Of a solved block: the n functions with ``c = scale' slope``."""
        raise NotImplementedError

    def _all_values(self, time: float) -> list[Table]:
        return [self._value_table(one, time) for one in self._solved]

    def _all_slopes(self, time: float) -> list[Table]:
        return [self._slope_table(one, time) for one in self._solved]

    # ---------------------------------------------------------------- where the process goes

    def _move(self, k: int, x: Tensor, tables: list[Table] | None, generator: Any) -> tuple[Tensor, Tensor, Any]:
        """Step k of the sketch, of the reference (tables None) or controlled: the next states, noise and shifts."""
        mean, scale = self._functions.step(x, k)
        xi = torch.randn(len(x), self._sketch.noise_shape[0], generator=generator, dtype=torch.float64)
        c = 0.0 if tables is None else apply_scale_transposed(scale, self._slopes(x, tables), 1)
        return mean + apply_scale(scale, c + xi, 1), xi, c

    def _walk(self, solved: list[Any] | None) -> Iterator[tuple[int, Tensor]]:
        """States of a few paths, of the reference or controlled by blocks' solutions, at the watched steps."""
        chain = self._sketch
        generator = generator_for("cpu", 0, Place.GRID_WALK)
        x = draw(self.problem.origin, _PATHS, 0).to("cpu", torch.float64)
        seen = set(watched(chain.steps + 1, _WATCHED))
        for k in range(chain.steps):
            if k in seen:
                yield k, x
            tables = None if solved is None else [self._slope_table(one, chain.clock[k]) for one in solved]
            x = self._move(k, x, tables, generator)[0]
            x = x[torch.isfinite(x).all(1)]
            if len(x) < _PATHS // 2:
                raise NoExactSolution("drift: most paths run to infinity, so there is no grid to solve on.")
        yield chain.steps, x

    @staticmethod
    def _reach(paths: list[tuple[int, Tensor]], margin: float | Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The middle 99 % at all times and a margin on both sides, ``(d,)`` each; for a Gaussian 2.6 + 1.6 margin
        standard deviations."""
        sizes = [x.abs().amax(1) for _, x in paths]
        usual, most = max(float(size.median()) for size in sizes), max(float(size.max()) for size in sizes)
        if most > _AWAY * (1 + usual):
            raise NoExactSolution(
                f"drift: some paths run away, to {most:.1g} where most are within {usual:.1g}: the steps are too long "
                "for the drift where those are. Use more time steps."
            )
        ends = []
        for _, x in paths:
            n, ordered = len(x), x.sort(0).values
            q = [ordered[min(int(p * n), n - 1)] for p in (0.005, 0.16, 0.84, 0.995)]
            ends.append((q[0] - margin * (q[1] - q[0]), q[3] + margin * (q[3] - q[2])))
        lows, highs = (torch.stack(side).numpy() for side in zip(*ends))
        return lows.min(0), highs.max(0)

    def _look_around(self) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
        """A state, states to probe with, and the range of the reference's paths."""
        paths = list(self._walk(None))
        lows, highs = self._reach(paths, _MARGIN_REFERENCE)
        if not (highs > lows).all():
            still = np.flatnonzero(~(highs > lows)).tolist()
            raise NoExactSolution(f"diffusion: coordinates {still} have no noise and do not move; grids need both.")
        generator = generator_for("cpu", 0, Place.GRID_PROBES)
        uniform = torch.rand(PROBES, len(lows), generator=generator, dtype=torch.float64)
        wide = torch.from_numpy(lows) + torch.from_numpy(highs - lows) * uniform
        middle, end = paths[len(paths) // 2][1], paths[-1][1]
        probes = torch.cat((middle[: PROBES // 2], wide[: PROBES // 2], wide[PROBES // 2 :], end[: PROBES // 2]))
        # equal coordinates get equal base values, so that their parts of a sum are equal
        own = end.median(0).values
        common = own.median().expand_as(own)
        inside = (common > torch.from_numpy(lows)) & (common < torch.from_numpy(highs))
        return torch.where(inside, common, own), probes, lows, highs

    # ---------------------------------------------------------------- blocks

    def _group(self, blocks: list[tuple[int, ...]]) -> list[Block]:
        """Equal blocks of one coordinate together: those whose functions are the same where only they differ from the
        base."""
        self._parts = len(blocks)
        singles = [b for b in blocks if len(b) == 1]
        groups = [Block([b]) for b in blocks if len(b) > 1]
        coordinates = [b[0] for b in singles]
        if not coordinates:
            return groups
        low, high = self._lows[coordinates].min(), self._highs[coordinates].max()
        z = torch.from_numpy(low + (high - low) * (0.5 + 0.5 * np.cos(np.linspace(0.1, 3.0, 23))))[:, None]
        made: list[tuple[list[Tensor], Block]] = []
        tolerance = lambda a: 64 * self._functions.eps * self._parts * (a.abs() + a.abs().max())  # noqa: E731
        for member in singles:
            x = self._at(z, member)
            own = [self._share(self._functions.reward, x)]
            for t in self._times:
                drift, noise, cost = self._local(x, member, t)
                own += [drift[:, 0], noise.norm(dim=(1, 2)), cost]
            for theirs, block in made:
                if all(bool(((a - b).abs() <= tolerance(a)).all()) for a, b in zip(own, theirs)):
                    block.members.append(member)
                    break
            else:
                made.append((own, Block([member])))
        return groups + [block for _, block in made]

    def _at(self, points: Tensor, member: tuple[int, ...]) -> Tensor:
        """States ``(N, d)`` that are the base but for one block's coordinates ``(N, n)``."""
        x = self._base.repeat(len(points), 1)
        x[:, list(member)] = points
        return x

    def _share(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """One block's part of a sum over blocks, at states that are the base in the others."""
        return function(x) - (self._parts - 1) / self._parts * function(self._base[None])

    def _local(self, x: Tensor, member: tuple[int, ...], time: float) -> tuple[Tensor, Tensor, Tensor]:
        """One block's drift ``(N, n)``, rows of the noise ``(N, n, m)``, and part of ``f/alpha`` ``(N,)``."""
        index = list(member)
        noise = self._functions.rows(self._noise(x, time), index, len(x))
        return self._drift(x, time)[:, index], noise, self._share(lambda y: self._functions.cost(y, time), x)

    # ---------------------------------------------------------------- grids

    def _on_grid(self, block: Block, widen: float, refinement: int) -> Any:
        """A block solved on a grid."""
        index = np.array(block.members)
        low, high = self._lows[index].min(0), self._highs[index].max(0)
        slack = widen * (high - low)
        cells = (self._counts[block.dim][refinement] - 1) * self._wider[index].max(0)
        grid = Grid(low - slack, high + slack, (cells + 1).tolist())
        x = self._at(torch.from_numpy(grid.points), block.members[0])
        end = self._share(self._functions.reward, x)
        if not bool(torch.isfinite(end).all()):
            at = grid.points[int((~torch.isfinite(end)).nonzero()[0])]
            raise NoExactSolution(
                f"reward is not finite at {np.array2string(at, precision=3)}, where the grid needs it."
            )
        return self._solve(block.members[0], x, end.numpy(), grid, refinement)

    def _slopes(self, x: Tensor, tables: list[Table]) -> Tensor:
        out = torch.empty_like(x)
        for block, table in zip(self.blocks, tables):
            index = torch.tensor(block.members)
            out[:, index] = table(x[:, index]).movedim(0, -1)
        return out

    def _refine(self) -> None:
        """Solve, see where optimal paths go, widen the grids until they stay inside, and halve them until u* stands
        still."""
        margin = torch.empty(len(self._lows), dtype=torch.float64)
        for block in self.blocks:
            margin[torch.tensor(block.members).flatten()] = self._margin[block.dim]
        for _ in range(8):
            solved = [self._on_grid(block, 0.0, 0) for block in self.blocks]
            walked = list(self._walk(solved))
            lows, highs = self._reach(walked, margin)
            slack = 0.05 * (self._highs - self._lows)
            inside = bool((lows > self._lows - slack).all() and (highs < self._highs + slack).all())
            self._lows, self._highs = np.minimum(self._lows, lows), np.maximum(self._highs, highs)
            if inside:
                break
        else:
            raise NoExactSolution(
                "optimal paths leave every grid: the reward drives them to infinity, or the noise there is too strong. "
                "Use a bounded reward or a larger alpha."
            )
        wide = [block for block in self.blocks if block.dim in self._still]
        if wide:
            for block in wide:
                self._widen(block, walked[0][1])
            solved = [self._on_grid(block, 0.0, 0) for block in self.blocks]
            walked = list(self._walk(solved))
        visited = [(k, x, self._functions.step(x, k)[1] / self._sketch.step_sizes[k] ** 0.5) for k, x in walked[:-1]]
        errors = [math.inf] * len(self.blocks)
        size = 0.0
        for level in range(1, max(len(c) for c in self._counts.values())):
            for i, block in enumerate(self.blocks):
                counts = self._counts[block.dim]
                if errors[i] <= self._good[block.dim] or level >= len(counts):
                    continue
                finer = self._on_grid(block, 0.05 * level, level)
                change, largest = self._change(block, solved[i], finer, visited)
                # the error left, if it falls with the fourth power at least (smooth: the sixth)
                errors[i] = change / (((counts[level] - 1) / (counts[level - 1] - 1)) ** 4 - 1)
                size, solved[i] = max(size, largest), finer
        self._solved, self.error = solved, max(errors)
        if not self.error <= _BAD * max(size, 1.0):
            raise NoExactSolution(
                f"no grid resolves this problem: the error of u* is still about {self.error:.2g} (largest |u*|: "
                f"{size:.2g}). A reward with jumps, or a time scale far below the step of the grid, does that."
            )

    def _widen(self, block: Block, start: Tensor) -> None:
        """Make a grid twice as wide in one coordinate after another, until values at the start stand still."""
        (member,) = block.members

        def values() -> Tensor:
            return self._value_table(self._on_grid(block, 0.0, 0), self._marks[0])(start[:, list(member)])[0]

        now = values()
        for i in member:
            for _ in range(_DOUBLINGS):
                before = self._lows[i], self._highs[i], self._wider[i]
                half, last = 0.5 * (self._highs[i] - self._lows[i]), now
                self._lows[i] -= half
                self._highs[i] += half
                self._wider[i] *= 2
                now = values()
                apart = float((now - last).abs().max())
                if apart <= self._still[block.dim]:
                    self._lows[i], self._highs[i], self._wider[i] = before
                    now = last
                    break
            else:
                raise NoExactSolution(
                    f"no grid is wide enough in coordinate {i}: values at the start still change by {apart:.2g} as one "
                    f"from {before[0]:.3g} to {before[1]:.3g} is made twice as wide. Use a bounded reward, a shorter "
                    "horizon, or particles (sc.SMC, sc.TemperedSMC)."
                )

    def _change(self, block: Block, old: Any, new: Any, visited: list[Any]) -> tuple[float, float]:
        """Between two solutions of a block: the root mean square change of u* at its worst time, and the largest
        |u*|."""
        squares, sizes = [], []
        for k, x, root in visited:
            tables = [self._slope_table(one, self._sketch.clock[k]) for one in (old, new)]
            for member in block.members[:2]:
                rows = self._functions.rows(root, list(member), len(x))
                before, after = (table(x[:, list(member)]).mT for table in tables)
                squares.append(((after - before).unsqueeze(1) @ rows).square().sum(-1).mean())
                sizes.append(float((after.unsqueeze(1) @ rows).norm(dim=-1).max()))
        return float(torch.stack(squares).max().sqrt()), max(sizes)

    def _check(self, lowest: float) -> None:
        """The mean log weight of paths that are simulated with the control (from a point) is J/alpha: compare it with
        the grids'.

        Raises:
            NoExactSolution: they disagree, by more than five standard errors and the bias of the sketch.
        """
        f, chain = self._functions, self._sketch
        generator = generator_for("cpu", 0, Place.GRID_CHECK)
        x = draw(self.problem.origin, _PATHS, 1).to("cpu", torch.float64)
        log_w: Any = 0.0
        for k, t in enumerate(chain.clock[:-1]):
            moved, xi, c = self._move(k, x, self._slope_tables(t), generator)
            log_w = log_w - ((c * xi).sum(1) + 0.5 * (c * c).sum(1)) - chain.step_sizes[k] * f.cost(x, t)
            x = moved
        log_w += f.reward(x)
        apart = abs(float(log_w.mean()) - lowest)
        if not apart <= 5 * float(log_w.std()) / len(log_w) ** 0.5 + self._bias * (1 + abs(lowest)):
            raise NoExactSolution(
                "no grid resolves this problem: simulated with its control, paths have a mean log weight of "
                f"{float(log_w.mean()):.4g}, where the grids say {lowest:.4g}. Steps that are too large for the drift "
                "or the reward do that."
            )

    @property
    def bounds(self) -> Tensor:
        return self._out(torch.from_numpy(np.stack([self._lows, self._highs], 1)))

    # ---------------------------------------------------------------- the interface

    def _sum_tables(self, x: Tensor, tables: list[Table]) -> Tensor:
        """Sum over all coordinates of the blocks' functions, ``(rows,)``."""
        total = torch.zeros(len(x), dtype=torch.float64)
        for block, table in zip(self.blocks, tables):
            total = total + table(x[:, torch.tensor(block.members)])[0].sum(1)
        return total

    def _value_at(self, x: States, time: float) -> PerPath:
        return self.problem.alpha * self._sum_tables(x, self._value_tables(time))

    def _control_at(self, x: States, time: float) -> Controls:
        """``scale' slope``: the control of a process (of a chain, the shift)."""
        return apply_scale_transposed(self._noise(x, time), self._slopes(x, self._slope_tables(time)), 1)

    def _shift_function(self, chain: Chain) -> ShiftFunction:
        times = [self._snap(t) for t in chain.clock[:-1]]
        return lambda k, x, condition: chain.shift_at(
            k, x, self._control_at(x.to("cpu", torch.float64), times[k]).to(x)
        )

    def _over_start(self, tables: list[Table], soft: bool) -> Tensor:
        """``log E exp w(X_0)`` or ``E w(X_0)`` over the first state."""
        mean, cov = self._first_moments()
        if self.problem.from_point:
            return self._out(self._sum_tables(mean[None], tables)[0])
        total = torch.zeros((), dtype=torch.float64)
        z = torch.arange(-12.0, 12.01, 0.125, dtype=torch.float64)
        for block, table in zip(self.blocks, tables):
            for member in block.members:
                index = list(member)
                values, vectors = torch.linalg.eigh(cov[index][:, index])
                root = vectors * values.clamp(min=0).sqrt()
                nodes = z[:, None] if block.dim == 1 else torch.cartesian_prod(z[::2], z[::2])
                log_p = (-0.5 * (nodes**2).sum(1)).log_softmax(0)
                w = table(mean[index] + nodes @ root.mT)[0]
                total = total + ((log_p + w).logsumexp(0) if soft else (log_p.exp() * w).sum())
        return self._out(total)

    def _first_moments(self) -> tuple[Tensor, Tensor]:
        mean, cov = super()._first_moments()
        block_of = {i: member for block in self.blocks for member in block.members for i in member}
        for i, j in (cov != 0).nonzero().tolist():
            if block_of[i] != block_of[j]:
                raise NoExactSolution(
                    f"initial: the covariance of the start couples coordinates {i} and {j}, which the process does "
                    "not; this quantity is known for independent blocks only. (value and control are exact.)"
                )
        return mean, cov

    @property
    def log_z(self) -> Scalar:
        return self._over_start(self._value_tables(self._marks[0]), True)

    @property
    def start_log_z(self) -> Scalar:
        return self._over_start(self._value_tables(self._marks[0]), False)

    def bridge(self, s: float, t: float, x_t: Tensor) -> Gaussian:
        raise NoExactSolution("bridge(s, t, x_t): bridges are not Gaussian here, and are not computed on grids.")

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, error of u* about {self.error:.1g})"
