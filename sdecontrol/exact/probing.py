"""What grid solutions find out about a problem by asking its functions: their values, and which coordinates act on each
other."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..chains.base import Chain
from ..errors import NoExactSolution
from ..problems.problem import ControlProblem
from ..tensors import is_matrix_scale

MOMENTS = 17  # times at which dependence is looked for, ends included
PROBES = 8  # pairs of states between which dependence is looked for
_PAIRS = 64  # dimensions up to which it is found out which pairs of coordinates a reward couples


def watched(count: int, most: int) -> list[int]:
    """At most ``most`` of the integers ``0 .. count - 1``, ends included."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


class Functions:
    """The problem's functions, and the steps of a chain, in float64 where they take it, at states ``(rows, d)``."""

    def __init__(self, problem: ControlProblem, chain: Chain) -> None:
        self.problem, self.chain = problem, chain
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
        return self._call("reward", self.problem.reward, x) / self.problem.alpha

    def cost(self, x: Tensor, t: float) -> Tensor:
        """``f/alpha``, ``(rows,)``; 0 in the learned start."""
        if t < 0 or self.problem.running_cost_function is None:
            return torch.zeros(len(x), dtype=torch.float64)
        cost = self._call("running_cost", lambda y: self.problem.running_cost(y, self._time(t, y)), x)
        return cost / self.problem.alpha

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
        return torch.diag_embed(scale.expand(count, *self.problem.event_shape)[:, index])


class Block(NamedTuple):
    """Equal blocks of coordinates that act on each other, e.g. ``[(3,), (4,)]``: two alike, of one coordinate each."""

    members: list[tuple[int, ...]]

    @property
    def dim(self) -> int:
        return len(self.members[0])


class Interactions:
    """Which coordinates act on each other, found by changing one coordinate at a time between probed states.

    Args:
        states: ``(2 * 8, d)`` to probe with.
    """

    def __init__(self, states: Tensor, functions: Functions) -> None:
        self.d = states.shape[1]
        self.x, self.y = states[:PROBES], states[PROBES : 2 * PROBES]
        self.functions = functions
        self.linked = np.eye(self.d, dtype=bool)
        self.reasons: dict[str, np.ndarray] = {}
        self.moved = self.x.repeat(self.d, 1, 1)  # (d, probes, d): coordinate j of state i replaced
        for j in range(self.d):
            self.moved[j, :, j] = self.y[:, j]

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
        """``function`` giving a scale, elementwise or ``(1 | rows, d, m)``: the same, and blocks have no noise in
        common."""
        base = function(self.x)
        if not is_matrix_scale(base, 1):
            self.add_map(name, lambda x: function(x).expand_as(x))
            return
        if base.shape[0] > 1:
            changes = torch.stack([(function(x) - base).abs().amax((0, 2)) for x in self.moved])  # (j, i)
            size = torch.cat((base, function(self.y))).abs().amax((0, 2)) + 1e-300
            self._link(name, (changes > 256 * self.functions.eps * size).numpy())
        size = torch.cat((base, function(self.y))).abs().amax(0)  # (d, m)
        used = (size > 256 * self.functions.eps * size.max()).numpy().astype(int)
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
                f"{name}: no exact solution is known, since it is not a sum of functions of one coordinate each (in "
                f"more than {_PAIRS} dimensions, smaller blocks are not looked for)."
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
