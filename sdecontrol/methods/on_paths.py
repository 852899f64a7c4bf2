"""What the methods that learn from stored paths share: whose paths they are, how starts are repeated, and the gradient
of a weighted sum of log-ratios along them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..controls.base import Control
from ..controls.build import build_control
from ..controls.given import given_control
from ..errors import check_name
from ..paths.paths import Paths
from ..paths.weights import warn_where_few
from ..problems.problem import ControlProblem
from ..problems.simulate import roll_out
from ..randomness import Place, generator_for
from .base import METRICS, ControlState, Method, Run, path_metrics

PATHS = ("current", "reference")


class PathState(ControlState):
    """State of a method that learns from paths: the control, and the one whose paths it learns from (None: its own)."""

    def __init__(self, control: Control, behaviour: Control | None) -> None:
        super().__init__(control)
        self.behaviour = behaviour


def path_state(run: Run, paths: Any = "current", group_size: int | None = None) -> PathState:
    """The state of a method that learns from ``paths``.

    Raises:
        ValueError: a batch that is no multiple of ``group_size``.
    """
    if group_size is not None and run.batch_size % group_size:
        raise ValueError(
            f"batch_size must be a multiple of group_size={group_size} (paths that share a start), got "
            f"{run.batch_size}."
        )
    behaviour = None
    if paths != "current":
        behaviour = given_control(run.problem, None if isinstance(paths, str) else paths, "paths")
    return PathState(build_control(run.problem, run.chain, run.control, seed=run.seed), behaviour)


def collect(state: PathState, run: Run, part: int, group_size: int | None = None, until: int | None = None) -> Paths:
    """The paths of the ``part``-th batch of this iteration; ``group_size`` consecutive ones share start and
    condition."""
    batch = run.batch(part)
    x0, condition = batch.x0, batch.condition
    if group_size is not None:
        first = torch.arange(len(x0) // group_size, device=x0.device).repeat_interleave(group_size)
        condition = None if condition is None else condition[first]
        if run.chain.reverse is None:  # a reverse law leads to the start: with one Y is constant over all of them
            x0 = x0[first]
    control = state.control if state.behaviour is None else state.behaviour
    return roll_out(run.problem, run.chain, control, x0, batch.noise, condition, until)


def starts_differ(problem: ControlProblem) -> bool:
    """Whether log Z differs from path to path: a random start that keeps its law, or conditions."""
    return problem.condition is not None or problem.random_start


def steps_of(run: Run, count: int | None, part: int = 0) -> list[int] | None:
    """``count`` different steps of the chain, drawn anew in every iteration; None: all."""
    if count is None or count >= run.chain.steps:
        return None
    generator = generator_for("cpu", run.seed, Place.LEARNED_STEPS, run.iteration, part)
    return sorted(torch.randperm(run.chain.steps, generator=generator)[:count].tolist())


def add_scores(run: Run, log_ratios: Tensor, coefficients: Tensor) -> None:
    """Add the gradient of ``mean over paths of sum_k a_k log p^u/p0 (x_{k+1}|x_k)`` with constant coefficients a.

    Args:
        log_ratios: with their graph, ``(steps, batch)``; of some of the steps: their sum stands for that of all
            (unbiased where they were drawn uniformly).
        coefficients: ``(batch,)`` or ``(steps, batch)``.
    """
    part = run.chain.steps / log_ratios.shape[0] / run.accumulate
    ((coefficients.detach() * log_ratios).sum(0).mean() * part).backward()


def regression_loss(paths: Paths, log_ratios: Tensor, weights: Tensor, steps: Sequence[int] | None) -> float:
    """``-E w log p^u`` per step, ``|c_k - z_k|^2/2`` of Gaussian kernels and their draws z, from the log-ratios of
    these steps."""
    draws = paths.draws if steps is None else paths.draws[list(steps)]
    return float((weights * (paths.chain.surprisal(draws) - log_ratios.detach())).mean())


def current_metrics(state: PathState, parts: Sequence[Paths]) -> dict[str, float]:
    """Metrics of the current control, from its own paths; other paths say nothing of its objective, reward and KL:
    nan."""
    return dict.fromkeys(METRICS, math.nan) if state.behaviour is not None else path_metrics(parts)


# ---------------------------------------------------------------- the method


class PathMethod(Method):
    """A method that learns from paths, one part of the batch after another; whose, and in what groups, are fields where
    they are a choice.

    Raises:
        ValueError: an unknown name. TypeError: no control.
    """

    paths: Any = "current"
    group_size: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.paths, str):
            check_name("paths", self.paths, PATHS)
        elif not callable(self.paths) and not callable(getattr(self.paths, "control", None)):
            raise TypeError(
                f"paths must be 'current', 'reference', or a control or solution whose paths to learn from; got "
                f"{type(self.paths).__name__}."
            )

    @property
    def residual(self) -> bool:  # type: ignore[override]
        """Other paths than its own say nothing of the objective."""
        return self.paths != "current"

    def setup(self, run: Run) -> Any:
        return path_state(run, self.paths, self.group_size)

    def step(self, state: Any, run: Run) -> dict[str, float]:
        parts: list[Paths] = []
        metrics: dict[str, float] = {}
        for part in range(run.accumulate):
            paths = collect(state, run, part, self.group_size)
            for name, value in self.learn(state, run, part, paths).items():
                metrics[name] = metrics.get(name, 0.0) + value / run.accumulate
            parts.append(paths)
        if "exponent" in metrics and run.iteration % 100 == 0:
            remedy = "Use trust_region=1.0, a larger batch or alpha, or better paths."
            warn_where_few(self.name, metrics["ess"], self.group_size or run.batch_size, remedy)
        run.descend()
        return {**current_metrics(state, parts), **metrics}

    def learn(self, state: Any, run: Run, part: int, paths: Paths) -> dict[str, float]:
        """Add the gradients of the ``part``-th batch of paths; its own metrics, of weighted paths "ess" and "exponent"
        among them."""
        raise NotImplementedError
