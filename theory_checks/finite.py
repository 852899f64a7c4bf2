"""Random control problems on finitely many states: the law of every path by enumeration, and the library's answers.

A case is written down in numpy, with its kernels by formulas of their own (scipy's matrix exponentials, products of
margins). ``case.reference()`` lists all paths with their probabilities; ``case.answers()`` asks the library for the
same. ``spoil(case, defect)`` is the case that a negative control hands to the library in the true one's stead.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.linalg import expm
from torch import nn

import sdecontrol as sc
from sdecontrol.chains.categorical import CategoricalChain
from sdecontrol.methods.base import Batch, Run
from sdecontrol.paths.paths import Paths

from .cases import tensor
from .registry import Setting

__all__ = ["FiniteAnswers", "FiniteCase", "Jumps", "Masked", "PathTable", "TableControl", "Tokens", "finite_cases"]


class PathTable:
    """All paths with a positive weight: their states ``(count, K+1)`` as indices, and the weights ``(count,)``."""

    def __init__(self, paths: np.ndarray, weights: np.ndarray, n: int) -> None:
        self.paths, self.weights, self.n = paths, weights, n

    @classmethod
    def of(cls, start: np.ndarray, kernels: list[np.ndarray]) -> PathTable:
        """Of the law of the first state ``(n,)`` and kernels ``(n, n)``."""
        paths = np.flatnonzero(start)[:, None]
        weights = start[paths[:, 0]]
        for kernel in kernels:
            row, column = np.nonzero(kernel[paths[:, -1]])
            weights = weights[row] * kernel[paths[row, -1], column]
            paths = np.concatenate([paths[row], column[:, None]], 1)
        return cls(paths, weights, len(start))

    @property
    def mass(self) -> float:
        return float(self.weights.sum())

    def weighted(self, factors: np.ndarray) -> PathTable:
        """The law in proportion to ``weights * factors``."""
        total = self.weights * factors
        return PathTable(self.paths, total / total.sum(), self.n)

    def marginal(self, k: int) -> np.ndarray:
        return np.bincount(self.paths[:, k], self.weights, self.n)

    def joint(self, j: int, k: int) -> np.ndarray:
        """``P(x_j, x_k)``, ``(n, n)``."""
        return np.bincount(self.paths[:, j] * self.n + self.paths[:, k], self.weights, self.n**2).reshape(self.n, -1)

    def given(self, j: int, k: int) -> np.ndarray:
        """``P(x_j | x_k)``, rows ``x_k``; zero where x_k never is."""
        joint = self.joint(j, k).T
        total = joint.sum(1, keepdims=True)
        return joint / np.where(total > 0, total, 1.0)

    def kl(self, other: PathTable) -> float:
        """``KL`` to a law of the same paths."""
        return float((self.weights * np.log(self.weights / other.weights)).sum())


@dataclass(frozen=True, kw_only=True)
class FiniteCase:
    """Rewards ``(n,)``, costs ``(1 + t) costs`` per unit of time or None, a law of the first state ``(n,)``, and
    times."""

    reward: np.ndarray
    costs: np.ndarray | None
    alpha: float
    start: np.ndarray
    clock: tuple[float, ...]
    values: int
    length: int = 1

    @property
    def n(self) -> int:
        return self.values**self.length

    @property
    def K(self) -> int:
        return len(self.clock) - 1

    @property
    def h(self) -> np.ndarray:
        return np.diff(self.clock)

    @property
    def single(self) -> bool:
        """Whether a step is one categorical variable."""
        return self.length == 1

    @property
    def label(self) -> str:
        return f"{type(self).__name__.lower()}, {self.n} states" + (", running cost" if self.costs is not None else "")

    # -------------------------------------------------------------- what each kind provides

    @property
    def kernels(self) -> list[np.ndarray]:
        """``(n, n)`` of each step."""
        raise NotImplementedError

    def process(self) -> Any:
        """The library's process or chain."""
        raise NotImplementedError

    def scaled(self, factor: float) -> FiniteCase:
        """With other kernels nearby."""
        raise NotImplementedError

    def reordered(self) -> FiniteCase:
        """With the kernels' states in another order."""
        raise NotImplementedError

    # -------------------------------------------------------------- for the library

    @cached_property
    def states(self) -> torch.Tensor:
        """All states ``(n, length)``; the last position runs fastest."""
        return torch.tensor(list(itertools.product(range(self.values), repeat=self.length)))

    def index(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.values ** torch.arange(self.length - 1, -1, -1)).sum(-1)

    def problem(self, reward: Callable[[torch.Tensor], torch.Tensor] | None = None) -> sc.ControlProblem:
        r, f = tensor(self.reward), None if self.costs is None else tensor(self.costs)
        cost = None if f is None else lambda x, t: (1 + t) * f[self.index(x)]
        return sc.ControlProblem(
            self.process(), reward=reward or (lambda x: r[self.index(x)]), running_cost=cost, alpha=self.alpha
        )

    @property
    def steps(self) -> dict[str, Any]:
        """How the chain is asked for."""
        return {}

    def answers(self) -> FiniteAnswers:
        return FiniteAnswers(self)

    # -------------------------------------------------------------- by enumeration

    def reference(self, k: int = 0, x: int | None = None) -> PathTable:
        """Paths of steps k .. K-1, from the start's law or from the state x."""
        start = self.start if x is None else np.eye(self.n)[x]
        return PathTable.of(start, self.kernels[k:])

    def gains(self, paths: np.ndarray, k: int = 0) -> np.ndarray:
        """``R_k/alpha`` of paths that begin at step k."""
        total = self.reward[paths[:, -1]]
        if self.costs is not None:
            for j in range(k, self.K):
                total = total - self.h[j] * (1 + self.clock[j]) * self.costs[paths[:, j - k]]
        return total / self.alpha

    def optimum(self) -> tuple[PathTable, float]:
        """``Q_fine``, ``dQ_fine/dQ0 = exp(R/alpha)/Z``, and log Z."""
        paths = self.reference()
        gained = np.exp(self.gains(paths.paths))
        return paths.weighted(gained), float(np.log((paths.weights * gained).sum()))

    def value(self, k: int, x: np.ndarray) -> np.ndarray:
        """``alpha log E_{Q0}[exp(R_k/alpha) | x_k]`` of some states, each by its own list of paths."""
        found = []
        for state in x:
            paths = self.reference(k, int(state))
            found.append(self.alpha * np.log((paths.weights * np.exp(self.gains(paths.paths, k))).sum()))
        return np.array(found)

    def reached(self, k: int) -> np.ndarray:
        """The states in which the reference may be at step k."""
        law = self.start
        for kernel in self.kernels[:k]:
            law = law @ kernel
        return np.flatnonzero(law)


@dataclass(frozen=True, kw_only=True)
class Jumps(FiniteCase):
    """Rates ``Q + t S``. Schemes: "exact" (S = 0), "euler"; sparse ones are handed over sparse."""

    rates: np.ndarray
    slope: np.ndarray
    scheme: str
    sparse: bool = False

    @property
    def label(self) -> str:
        return f"{super().label}, {self.scheme}{', sparse' if self.sparse else ''}"

    @property
    def kernels(self) -> list[np.ndarray]:
        if self.scheme == "exact":
            return [expm(h * self.rates) for h in self.h]
        return [np.eye(self.n) + h * (self.rates + t * self.slope) for t, h in zip(self.clock, self.h)]

    def process(self) -> sc.JumpProcess:
        kept = (lambda m: sparse.csr_array(m)) if self.sparse else tensor
        rates: Any = (lambda t: kept(self.rates + float(t) * self.slope)) if self.slope.any() else kept(self.rates)
        where = np.flatnonzero(self.start)
        initial: Any = int(where[0]) if len(where) == 1 else tensor(self.start)
        with _double():  # of which scipy's matrices say nothing
            return sc.JumpProcess(rates, self.clock[-1], initial)

    @property
    def steps(self) -> dict[str, Any]:
        return {"time_steps": list(self.clock), "scheme": self.scheme}

    def scaled(self, factor: float) -> Jumps:
        return replace(self, rates=factor * self.rates, slope=factor * self.slope)

    def reordered(self) -> Jumps:
        return replace(self, rates=self.rates[::-1, ::-1], slope=self.slope[::-1, ::-1])


@dataclass(frozen=True, kw_only=True)
class Tokens(FiniteCase):
    """Probabilities ``(K, n, length, values)``: positions are independent given the state."""

    probs: np.ndarray

    @property
    def kernels(self) -> list[np.ndarray]:
        x = self.states.numpy()
        return [np.stack([rows[:, j, x[:, j]] for j in range(self.length)]).prod(0) for rows in self.probs]

    def process(self) -> CategoricalChain:
        table, where = tensor(np.log(self.probs)), int(np.flatnonzero(self.start)[0])
        law = lambda k, x: table[k][self.index(x)]  # noqa: E731
        return CategoricalChain(law, self.K, self.values, self.states[where], dtype=torch.float64)

    def scaled(self, factor: float) -> Tokens:
        return replace(self, probs=_normalised(self.probs**factor))

    def reordered(self) -> Tokens:
        return replace(self, probs=self.probs[:, ::-1])


@dataclass(frozen=True, kw_only=True)
class Masked(FiniteCase):
    """A masked diffusion in random order whose model has the conditionals of a joint law ``(n,)``, zero at states with
    a mask; ``tilts (n, length, V)`` of the model's logits make it inconsistent."""

    law: np.ndarray
    tilts: np.ndarray
    order: str = "random"

    @property
    def single(self) -> bool:
        return True

    @cached_property
    def letters(self) -> np.ndarray:
        """The model's probabilities ``(n, length, V)``, by summation over all ends."""
        x, V = self.states.numpy(), self.values - 1
        agrees = ((x[:, None] == x[None]) | (x[:, None] == V)).all(2) * self.law
        each = np.stack([agrees @ (x == v) for v in range(V)], -1) / agrees.sum(1)[:, None, None]
        return _normalised(np.maximum(each, 1e-300) * np.exp(self.tilts))

    @property
    def kernels(self) -> list[np.ndarray]:
        x, V = self.states.numpy(), self.values - 1
        kernel = np.zeros((self.n, self.n))
        for i, state in enumerate(x):
            masked = np.flatnonzero(state == V)
            if not len(masked):
                kernel[i, i] = 1.0
            for j, v in itertools.product(masked, range(V)):
                kernel[i, i + (v - V) * self.values ** (self.length - 1 - j)] = self.letters[i, j, v] / len(masked)
        return [kernel] * self.K

    def process(self) -> Any:
        logits = tensor(np.log(self.letters))
        model = lambda x, s: logits[self.index(x)]  # noqa: E731
        steps = None if self.order == "random" else 2 * self.length
        return sc.masked_diffusion(model, self.length, self.values - 1, steps, order=self.order, dtype=torch.float64)

    def scaled(self, factor: float) -> Masked:
        return replace(self, law=np.where(self.law > 0, self.law**factor, 0.0))

    def reordered(self) -> Masked:
        """Sequences read backwards."""
        return replace(self, law=self.law.reshape((self.values,) * self.length).T.ravel())


class _double:
    """torch's default dtype is float64 within."""

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(self.before)


def _normalised(x: np.ndarray) -> np.ndarray:
    return x / x.sum(-1, keepdims=True)


def _rates(x: np.ndarray) -> np.ndarray:
    """With the diagonal that rates have."""
    x = x - np.diag(np.diag(x))
    return x - np.diag(x.sum(1))


# ------------------------------------------------------------------ the library's answers


class FiniteAnswers:
    """What the library says of a case's chain, in numpy."""

    def __init__(self, case: FiniteCase) -> None:
        self.case, self.problem = case, case.problem()
        self.exact: Any = sc.exact_solution(self.problem, **case.steps)
        self.chain: Any = self.exact.chain

    def at(self, k: int) -> torch.Tensor:
        return self.case.states[self.case.reached(k)]

    def kernel(self, k: int) -> np.ndarray:
        """p* of step k; zero from states that no path comes to."""
        made = np.zeros((self.case.n, self.case.n))
        made[self.case.reached(k)] = self.exact.kernel(self.at(k), k).probs.numpy()
        return made

    def induced(self, kernels: int | None = None) -> PathTable:
        """The path law that its kernels make from the start (the first ``kernels`` of them)."""
        count = self.case.K if kernels is None else kernels
        return PathTable.of(self.case.start, [self.kernel(k) for k in range(count)])

    def value(self, k: int) -> np.ndarray:
        """At the states that are reached."""
        return self.exact.value(self.at(k), self.case.clock[k]).numpy()

    def marginal(self, k: int) -> np.ndarray:
        return self.exact.marginal(self.case.clock[k]).probs.numpy()

    def bridge(self, j: int, k: int) -> np.ndarray:
        """``P*(x_j | x_k)``, rows x_k; zero from states that no path comes to."""
        made = np.zeros((self.case.n, self.case.n))
        made[self.case.reached(k)] = self.exact.bridge(self.case.clock[j], self.case.clock[k], self.at(k)).probs.numpy()
        return made

    def tilts(self, strength: float = 1.0) -> torch.Tensor:
        """The control at all states ``(K, n, *control_shape)``, 0 at those that no path comes to."""
        found = torch.zeros(self.case.K, self.case.n, *self.problem.control_shape, dtype=torch.float64)
        for k in range(self.case.K):
            found[k][self.case.reached(k)] = strength * self.exact.control(self.at(k), self.case.clock[k])
        return found

    def values(self) -> torch.Tensor:
        """``v/alpha`` of all steps and states ``(K, n)``, 0 at those that no path comes to."""
        found = torch.zeros(self.case.K, self.case.n, dtype=torch.float64)
        for k in range(self.case.K):
            found[k][self.case.reached(k)] = tensor(self.value(k) / self.case.alpha)
        return found


class TableControl(nn.Module):
    """A user's control that is a table of tilts ``(K, n, *control_shape)``, all of them parameters."""

    def __init__(self, case: FiniteCase, tilts: torch.Tensor) -> None:
        super().__init__()
        self.case, self.clock, self.tilts = case, tensor(case.clock), nn.Parameter(tilts.clone())

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        k = (self.clock[:-1][None] <= t.double()[:, None] + 1e-9).sum(1) - 1
        return self.tilts[k, self.case.index(x)]


class TableValue(nn.Module):
    """A value ``v/alpha`` that is a table ``(K, n)`` of parameters, in the place of a learned network's."""

    def __init__(self, case: FiniteCase, values: torch.Tensor) -> None:
        super().__init__()
        self.case, self.values = case, nn.Parameter(values.clone())

    def along(self, states: torch.Tensor, times: torch.Tensor, y: Any = None) -> torch.Tensor:
        return torch.stack([self.values[k][self.case.index(x)] for k, x in enumerate(states)])


class OnPaths(Run):
    """One iteration of a method on paths that are given: its noise draws them under the reference."""

    paths: np.ndarray | None = None

    def batch(self, part: int = 0, group_size: int = 1) -> Batch:
        if self.paths is None:
            return super().batch(part, group_size)
        case = self.case  # type: ignore[attr-defined]
        # Gumbel-max of these picks the given token, whatever its probability
        chosen = case.states[torch.as_tensor(self.paths.T)]
        noise = 12 * nn.functional.one_hot(chosen[1:], case.values).double() - 6
        return Batch(chosen[0], noise, None, 0)  # type: ignore[arg-type]


def iteration(
    case: FiniteCase,
    method: Any,
    tilts: torch.Tensor,
    paths: np.ndarray | None = None,
    *,
    values: torch.Tensor | None = None,
    log_z: float | None = None,
    seed: int = 0,
) -> tuple[dict[str, float], torch.Tensor]:
    """One iteration of the library's method from a table of tilts: its metrics, and the gradient in all its parameters.

    Args:
        paths: all paths that the reference draws, one each; None: 256 random ones.
        values: ``v/alpha`` as its value function. log_z: as its learned log Z.
    """
    problem = case.problem()
    chain = problem.chain(**case.steps) if case.steps else problem.chain()
    batch = 256 if paths is None else len(paths)
    run = OnPaths(problem, chain, batch, 1, seed, TableControl(case, tilts))
    run.case, run.paths = case, paths  # type: ignore[attr-defined]
    state = method.setup(run)
    if values is not None:
        state.value = TableValue(case, values)
    if log_z is not None:
        state.log_z.level.fill_(log_z)
        state.log_z.count += 1
    metrics = method.step(state, run)
    parts = [p.grad.flatten() for p in state.parameters() if p.grad is not None]
    return metrics, torch.cat(parts)


def every_path(case: FiniteCase) -> np.ndarray:
    """Paths whose empirical law is the reference's, each kernel being in quarters: so many times as their weight
    says."""
    table = case.reference()
    counts = table.weights * 4.0**case.K
    if np.abs(counts - counts.round()).max() > 1e-9:
        raise ValueError("kernels must have probabilities in quarters.")
    return np.repeat(table.paths, counts.round().astype(int), 0)


def path_table(paths: Paths, case: FiniteCase) -> np.ndarray:
    """The indices ``(count, K+1)`` of the library's paths."""
    return case.index(paths.states).T.numpy()


# ------------------------------------------------------------------ random cases


def _jumps(rng: np.random.Generator, n: int, K: int, scheme: str, common: dict[str, Any]) -> Jumps:
    rates = _rates(rng.uniform(0.1, 1.5, size=(n, n)))
    slope = _rates(rng.uniform(0.0, 0.8, size=(n, n))) if scheme == "euler" else 0 * rates
    few = scheme == "sparse"
    if few:  # neighbours alone
        near = np.abs(np.subtract.outer(np.arange(n), np.arange(n))) == 1
        rates = _rates(np.where(near, rates, 0.0))
    inner = np.sort(rng.uniform(0.3, 0.7, size=K)).cumsum()
    leaving = -min(np.diag(rates + 3 * slope).min(), np.diag(rates).min())  # at most, up to time 3
    horizon = rng.uniform(0.7, 1.3) if scheme == "exact" else min(3.0, 0.8 * inner[-1] / (0.7 * leaving))
    clock = (0.0, *(horizon * inner[:-1] / inner[-1]), horizon)
    return Jumps(rates=rates, slope=slope, scheme="euler" if few else scheme, sparse=few, clock=clock, **common)


def _common(rng: np.random.Generator, n: int, values: int, length: int, cost: bool) -> dict[str, Any]:
    return {
        "reward": 1.2 * rng.normal(size=n),
        "costs": rng.uniform(0.2, 1.5, size=n) if cost else None,
        "alpha": rng.uniform(0.5, 1.5),
        "start": np.eye(n)[rng.integers(n)],
        "values": values,
        "length": length,
    }


def tokens_case(rng: np.random.Generator, *, values: int, length: int, K: int, cost: bool = False) -> Tokens:
    n = values**length
    probs = _normalised(rng.gamma(1.0, size=(K, n, length, values)) + 0.02)
    return Tokens(probs=probs, clock=tuple(k / K for k in range(K + 1)), **_common(rng, n, values, length, cost))


def quarters_case(rng: np.random.Generator, cost: bool = False) -> Tokens:
    """Three tokens, three steps, all probabilities in quarters."""
    case = tokens_case(rng, values=3, length=1, K=3, cost=cost)
    probs = np.array([0.5, 0.25, 0.25])[np.argsort(rng.normal(size=case.probs.shape), -1)]
    return replace(case, probs=probs)


def masked_case(rng: np.random.Generator, length: int = 3, vocabulary: int = 2) -> Masked:
    n = (vocabulary + 1) ** length
    common = _common(rng, n, vocabulary + 1, length, False)
    x = np.array(list(itertools.product(range(vocabulary + 1), repeat=length)))
    whole = (x < vocabulary).all(1)
    common["start"] = np.eye(n)[n - 1]
    law = np.where(whole, rng.gamma(0.7, size=n) + 0.02, 0.0)
    clock = tuple(k / length for k in range(length + 1))
    return Masked(law=law / law.sum(), tilts=np.zeros((n, length, vocabulary)), clock=clock, **common)


def finite_cases(
    setting: Setting, *, cost: bool = False, single: bool = False, masked: bool = True, random_start: bool = False
) -> Iterator[FiniteCase]:
    """Random problems of each kind: jump processes with exact kernels, of rates that depend on time, and sparse ones;
    one token; two tokens at once (unless ``single``); a masked diffusion in random order."""
    rng = setting.rng(31 + cost)
    for _ in range(setting.count(1, 5)):
        for n, K, scheme in ((4, 4, "exact"), (3, 5, "euler"), (5, 4, "sparse")):
            case = _jumps(rng, n, K, scheme, _common(rng, n, n, 1, cost))
            if random_start:
                case = replace(case, start=rng.dirichlet(np.ones(n)))
            yield case
        if random_start:
            continue
        yield tokens_case(rng, values=4, length=1, K=3, cost=cost)
        if not single:
            yield tokens_case(rng, values=2, length=2, K=4, cost=cost)
        if masked and not cost:
            yield masked_case(rng)


SPOILED: dict[str, Callable[[FiniteCase], FiniteCase]] = {
    "alpha off by 5 %": lambda c: replace(c, alpha=1.05 * c.alpha),
    "sign of r flipped": lambda c: replace(c, reward=-c.reward),
    "kernels off by 1 %": lambda c: c.scaled(1.01),
    "states in another order": lambda c: c.reordered(),
    "running cost left out": lambda c: replace(c, costs=None),
    "another start": lambda c: c if isinstance(c, Masked) else replace(c, start=np.roll(c.start, 1)),
}


def spoil(case: FiniteCase, defect: str) -> FiniteCase:
    """The case that is handed to the library: the true one, unless ``defect`` is one of :data:`SPOILED`."""
    return SPOILED[defect](case) if defect in SPOILED else case
