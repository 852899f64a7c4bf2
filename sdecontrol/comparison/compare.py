"""``compare``: any methods on one problem, side by side, beside the exact law where that is known."""

import contextlib
import dataclasses
import math
import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import NoExactSolution, NonFiniteError
from ..evaluation.estimates import Estimate
from ..evaluation.metrics import control_error, sliced_wasserstein
from ..evaluation.particle_solution import ParticleSolution
from ..evaluation.solution import Solution
from ..exact.base import ExactSolution
from ..methods.base import Method, Suggestion, find_method, suggested
from ..problems.problem import ControlProblem, check_problem
from ..problems.rewards import Quadratic
from ..processes.laws import Dirac
from ..processes.linear import LinearSDE
from ..randomness import Place, derive_seed, fresh_seed
from ..tensors import check_count
from ..training.solve import solve
from .costs import Costs, measuring
from .frontier import FrontierPoint, exact_frontier, nearest_exact

#: name of every column and its heading
COLUMNS = {
    "distance": "sliced W1 to exact",
    "control_error": "rel. control error",
    "reward": "reward",
    "running_cost": "running cost",
    "kl": "KL",
    "gap": "gap",
    "ess": "ESS",
    "reward_calls": "reward calls",
    "gradient_calls": "gradient calls",
    "network_calls": "network calls",
    "seconds": "CPU s",
    "memory": "peak MiB",
    "sampling_reward_calls": "reward calls/sample",
    "sampling_network_calls": "network calls/sample",
    "sampling_seconds": "CPU s/1000 samples",
}
_COUNTS = ("reward_calls", "gradient_calls", "network_calls", "sampling_reward_calls", "sampling_network_calls")
_SUGGESTED = 3  # methods that are compared where none are named


@dataclass
class ComparisonRow:
    """One method.

    Attributes:
        label: its name, with the settings that differ from their defaults.
        method: itself.
        estimates: column -> :class:`Estimate`; empty where no seed gave a solution. What does not apply is left out.
        chosen: why ``recommend`` chose it; None where the caller named it.
        reason: why there is no solution: what the method refused, or where it diverged (of the first such seed); None
            where there is nothing to say.
        failed: the seeds that gave none.
        solutions: those of the other seeds, in their order.
    """

    label: str
    method: Method
    estimates: dict[str, Estimate] = field(default_factory=dict)
    chosen: str | None = None
    reason: str | None = None
    failed: list[int] = field(default_factory=list)
    solutions: list[Solution] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; numbers that are not finite are None."""
        numbers = {
            name: {part: v if math.isfinite(v := getattr(e, part)) else None for part in ("value", "stderr")}
            for name, e in self.estimates.items()
        }
        return {
            "method": self.label,
            "chosen": self.chosen,
            "reason": self.reason,
            "failed_seeds": self.failed,
            **numbers,
        }


@dataclass
class Comparison:
    """What :func:`compare` returns; prints as a table.

    Attributes:
        rows: one :class:`ComparisonRow` per method, in the order given.
        seeds: of the trainings. n: paths and samples of every evaluation.
        exact: which exact solution the table is against: "of the chain", "in continuous time", or None.
        distance_floor: sliced W1 between two sets of n exact samples: what a perfect sampler scores; nan without an
            exact law.
        frontier: the tilted family at temperatures around the problem's; empty where its closed form is not known.
    """

    problem: ControlProblem
    rows: list[ComparisonRow]
    seeds: list[int]
    n: int
    exact: str | None
    distance_floor: float
    frontier: list[FrontierPoint]

    def __getitem__(self, label: str) -> ComparisonRow:
        """The row of a method, by its label.

        Raises:
            KeyError: naming the labels there are.
        """
        for row in self.rows:
            if row.label == label:
                return row
        raise KeyError(f"no method {label!r}; there are {', '.join(row.label for row in self.rows)}.")

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        used = [c for c in COLUMNS if any(c in row.estimates for row in self.rows)]
        body = []
        for row in self.rows:
            cells = [_text(row.estimates.get(c), count=c in _COUNTS) for c in used]
            body.append([row.label, *(cells if row.estimates else ["-"] * len(used))])
        return ["method", *(COLUMNS[c] for c in used)], body

    def notes(self) -> list[str]:
        """What the numbers are, and what went wrong, line by line."""
        several = len(self.seeds) > 1
        error = f"over {len(self.seeds)} seeds" if several else "of one seed's own estimates (between seeds: unknown)"
        out = [f"± standard error {error}; {self.n} paths per evaluation."]
        if self.exact is not None:
            out.append(f"Exact solution {self.exact}.")
            if math.isfinite(self.distance_floor):
                out[-1] += f" Two sets of {self.n} exact samples are {self.distance_floor:.3g} apart."
        else:
            out.append("No exact solution is known: gaps are estimates, blind to modes that were never visited.")
        out += [f"{row.label}, chosen by recommend: {row.chosen}" for row in self.rows if row.chosen is not None]
        for row in self.rows:
            if row.reason is not None:
                which = f" ({len(row.failed)} of {len(self.seeds)} seeds)" if several else ""
                out.append(f"{row.label}{which}: {row.reason}")
        return out

    def table(self) -> str:
        """The table in Markdown, with its notes below."""
        head, body = self._cells()
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" + "---:|" * (len(head) - 1)]
        lines += ["| " + " | ".join(row) + " |" for row in body]
        return "\n".join([*lines, "", *(f"* {note}" for note in self.notes())])

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int | None = None) -> str:
        """The table in columns, with its notes below.

        Args:
            width: characters of a line. What does not fit beside the methods' names goes on below, under the names
                again. None: as wide as it is.
        """
        head, body = self._cells()
        widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
        parts: list[list[int]] = [[0]]
        for i, w in enumerate(widths[1:], 1):
            taken = sum(widths[j] + 2 for j in parts[-1])
            if width is not None and len(parts[-1]) > 1 and taken + w > width:
                parts.append([0])
            parts[-1].append(i)
        lines = []
        for part in parts:
            rows = [
                "  ".join(row[i].rjust(widths[i]) if i else row[0].ljust(widths[0]) for i in part)
                for row in [head, *body]
            ]
            lines += [rows[0], "-" * len(rows[0]), *rows[1:], ""]
        return "\n".join([*lines, *self.notes()])

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "seeds": self.seeds,
            "n": self.n,
            "exact": self.exact,
            "distance_floor": self.distance_floor if math.isfinite(self.distance_floor) else None,
            "rows": [row.as_dict() for row in self.rows],
            "frontier": [point._asdict() for point in self.frontier],
        }

    def figure(self) -> tuple[Any, Any]:
        """Reward (less running cost) against KL for all methods, with the exact frontier where it is known:
        ``(figure, axes)``.

        Methods whose KL is not known (particles) are horizontal lines.
        """
        from .figure import reward_against_kl

        cost = self.problem.running_cost_function is not None
        return reward_against_kl({r.label: r.estimates for r in self.rows}, self.frontier, self.problem.alpha, cost)


def compare(
    problem: ControlProblem,
    methods: Iterable[Method | str] | Mapping[str, Method | str] | None = None,
    *,
    seeds: int | Sequence[int] = 1,
    seed: int | None = None,
    time_steps: Any = None,
    scheme: str | None = None,
    iterations: int | None = None,
    budget: str | float | None = None,
    batch_size: int = 256,
    n: int = 4096,
    progress: bool | None = False,
) -> Comparison:
    """Solve one problem by several methods and put distance to the exact law, reward, KL, gap and costs side by side.

    A method that refuses the problem, or diverges, is a row with its reason. Evaluations of one seed share their noise
    between methods. An exact solution on a grid, where there is no closed form, may take up to half a minute first.

    Args:
        methods: methods or their names; or a mapping label -> method (for one method with two settings that print
            alike). None: the first three choices of :func:`recommend`, whose reasons stand below the table.
        seeds: number of trainings per method (seeds ``seed, seed + 1, ...``), or the seeds themselves. With several,
            every number is their mean with its standard error; with one, the error is the estimate's own.
        seed: of the first training; None draws one from torch's global generator.
        time_steps, scheme, iterations, budget, batch_size: as in :func:`solve`, the same for all; ``iterations`` and
            ``budget`` are left out for methods that train nothing.
        n: paths, and samples, of each evaluation, >= 64.
        progress: show each training's progress bar; None: if the terminal can.

    Returns:
        :class:`Comparison`. "CPU s", calls and "peak MiB" are of training; what sampling costs stands beside it, per
        sample. Calls are rows.

    Raises:
        ValueError, TypeError: bad arguments, unknown methods. Errors of other kinds inside a method are not caught.
    """
    check_problem(problem)
    trainings = _seeds(seeds, seed)
    check_count("n", n, 64)
    check_count("batch_size", batch_size)
    check_count("iterations", iterations, optional=True)
    settings = {"time_steps": time_steps, "scheme": scheme}
    chosen: dict[str, Suggestion] = {}
    if methods is None:
        advice = suggested(problem, time_steps=time_steps, batch_size=batch_size)[:_SUGGESTED]
        chosen = {suggestion_label(s): s for s in advice}
        methods = {label: s.method for label, s in chosen.items()}
    named = _labelled(methods)
    problem.chain(**settings)  # a bad grid is the caller's error, not every method's
    try:
        exact, kind = nearest_exact(problem, **settings)
    except NoExactSolution:
        exact, kind = None, None
    reference, floor = None, math.nan
    if exact is not None:
        with contextlib.suppress(NoExactSolution):
            reference = exact.sample(n, derive_seed(trainings[0], Place.COMPARISON_EXACT))
            other = exact.sample(n, derive_seed(trainings[0], Place.COMPARISON_FLOOR))
            floor = sliced_wasserstein(reference, other)
    rows = []
    for label, method in named.items():
        more: dict[str, Any] = {"batch_size": batch_size, "progress": progress, **settings}
        if method.default_iterations > 0:
            more.update(iterations=iterations, budget=budget)
        if label in chosen and "control" in chosen[label].settings:
            more["control"] = chosen[label].settings["control"]
        _warm_up(method)
        rows.append(_row(problem, label, method, trainings, n, exact, reference, more))
        rows[-1].chosen = chosen[label].reason if label in chosen else None
    return Comparison(problem, rows, trainings, n, kind, floor, exact_frontier(problem, **settings))


# ---------------------------------------------------------------- one method


def _warm_up(method: Method) -> None:
    """One iteration on a toy problem: else the first cell would pay, in seconds and memory, for code that is loaded on
    its first use."""
    toy = ControlProblem(LinearSDE(-torch.eye(2), 1.0), Dirac(torch.zeros(2)), Quadratic(torch.eye(2), torch.ones(2)))
    more: dict[str, Any] = {"iterations": 1} if method.default_iterations > 0 else {}
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solve(toy, method, time_steps=2, batch_size=64, seed=0, progress=False, **more).evaluate(64, seed=0)


def _row(
    problem: ControlProblem,
    label: str,
    method: Method,
    seeds: list[int],
    n: int,
    exact: ExactSolution | None,
    reference: torch.Tensor | None,
    settings: dict[str, Any],
) -> ComparisonRow:
    row = ComparisonRow(label, method)
    found: list[dict[str, Estimate]] = []
    for seed in seeds:
        try:
            with measuring(problem.device) as training:
                solution = solve(problem, method, seed=seed, **settings)
            found.append(_measure(solution, training, n, seed, exact, reference))
            row.solutions.append(solution)
        except (ValueError, TypeError, RuntimeError) as error:
            row.failed.append(seed)
            diverged = "diverged: " if isinstance(error, NonFiniteError) else ""
            row.reason = row.reason or diverged + " ".join(str(error).split()) or type(error).__name__
    names = [name for name in COLUMNS if any(name in one for one in found)]
    row.estimates = {name: _over_seeds([one[name] for one in found if name in one]) for name in names}
    return row


def _measure(
    solution: Solution,
    training: Costs,
    n: int,
    seed: int,
    exact: ExactSolution | None,
    reference: torch.Tensor | None,
) -> dict[str, Estimate]:
    """All columns of one solution."""
    with measuring(solution.problem.device) as sampling:
        samples = solution.sample(n, seed=derive_seed(seed, Place.COMPARISON_SAMPLES), raw=True)
    place = derive_seed(seed, Place.COMPARISON_EVALUATION)
    evaluation = solution.evaluate(n, seed=place)
    out = {name: getattr(evaluation, name) for name in ("reward", "kl", "gap", "ess")}
    if solution.problem.running_cost_function is not None:
        out["running_cost"] = evaluation.running_cost
    if reference is not None:
        out["distance"] = Estimate(sliced_wasserstein(samples, reference))
    if exact is not None and not isinstance(
        solution, ParticleSolution
    ):  # a particle solution's control is its proposal's
        out["control_error"] = control_error(solution, exact, n=n, seed=place).relative
    for name in ("reward_calls", "gradient_calls", "network_calls", "seconds", "memory"):
        out[name] = Estimate(float(getattr(training, name)))
    out["sampling_reward_calls"] = Estimate(sampling.reward_calls / n)
    out["sampling_network_calls"] = Estimate(sampling.network_calls / n)
    out["sampling_seconds"] = Estimate(1000 * sampling.seconds / n)
    return {name: e for name, e in out.items() if math.isfinite(e.value)}


def _over_seeds(estimates: list[Estimate]) -> Estimate:
    """Their mean, with the standard error between them; a single one as it is."""
    if len(estimates) == 1:
        return estimates[0]
    values = [e.value for e in estimates]
    return Estimate(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)))


# ---------------------------------------------------------------- arguments and text


def _labelled(methods: Any) -> dict[str, Method]:
    if isinstance(methods, (str, Method, type)) or not isinstance(methods, Iterable):
        raise TypeError("methods must be a list of methods or names, or a mapping label -> method.")
    if isinstance(methods, Mapping):
        out = {str(label): find_method(method) for label, method in methods.items()}
    else:
        out = {}
        for method in map(find_method, methods):
            if (label := method_label(method)) in out:
                raise ValueError(f"methods has {label} twice; give a mapping label -> method to tell them apart.")
            out[label] = method
    if not out:
        raise ValueError("methods is empty: give at least one method.")
    return out


def suggestion_label(suggestion: Suggestion) -> str:
    """The method's label, with the way of controlling a model where that is not the default."""
    control = suggestion.settings.get("control")
    return method_label(suggestion.method) + ("" if control is None else f", control={control!r}")


def method_label(method: Method) -> str:
    """The name, with the settings that are not the default."""
    changed = []
    for f in dataclasses.fields(method):
        value = getattr(method, f.name)
        if value is f.default or (isinstance(value, (str, int, float, bool)) and value == f.default):
            continue
        plain = isinstance(value, (str, int, float, bool, tuple, type(None)))
        changed.append(
            f"{f.name}={method_label(value) if isinstance(value, Method) else value if plain else type(value).__name__}"
        )
    return f"{method.name}({', '.join(changed)})" if changed else method.name


def _seeds(seeds: Any, seed: int | None) -> list[int]:
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        check_count("seeds", seeds)
        first = fresh_seed(seed)
        return [first + i for i in range(seeds)]
    if isinstance(seeds, (str, bool)) or not isinstance(seeds, Iterable):
        raise TypeError(f"seeds must be a number of seeds or a sequence of them, got {type(seeds).__name__}.")
    if seed is not None:
        raise ValueError("seed is that of the first of a number of seeds; with a sequence of seeds leave it out.")
    out = list(seeds)
    if not out or len(set(out)) < len(out) or None in out:
        raise ValueError(f"seeds must be different numbers, and at least one; got {out}.")
    return [fresh_seed(s) for s in out]


def _text(estimate: Estimate | None, count: bool) -> str:
    if estimate is None:
        return "-"
    value, error = estimate.value, estimate.stderr
    if count:
        return f"{value:.0f}" if abs(value) < 1e5 else f"{value:.3g}"
    if not math.isfinite(error):
        return f"{value:.3g}"
    if 0 < abs(value) < 1e-3:
        return f"{value:.1e} ± {error:.0e}"
    return str(Estimate(value, error)) if error else f"{value:.4g}"
