"""What the methods that learn from stored paths share: whose paths they are, how starts are repeated, and the gradient
of a weighted sum of log-ratios along them."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ranks
from ..controls.base import Control
from ..controls.given import given_control
from ..errors import check_name
from ..paths.paths import Paths, StepLaws
from ..paths.weights import warn_where_few
from ..problems.problem import ControlProblem
from ..problems.simulate import roll_out
from ..randomness import Place, generator_for
from ..shapes import PerStep
from ..tensors import check_count, check_positive
from .base import METRICS, ControlState, Method, Run, first_control, path_metrics
from .ladder import PASSES, Ladder

PATHS = ("current", "reference")


class PathState(ControlState):
    """State of a method that learns from paths: the control, the one whose paths it learns from (None: its own), and
    the paths that it learns from again, if any."""

    def __init__(self, control: Control, behaviour: Control | None) -> None:
        super().__init__(control)
        self.behaviour = behaviour
        self.replay: Ladder | None = None

    @property
    def own_paths(self) -> bool:
        """Whether all paths are drawn by the control as it is when they are learned from."""
        return self.behaviour is None and self.replay is None

    @property
    def exponent(self) -> float:
        """beta of the target ``(P^v)^{1-beta} Q_fine^beta``, v the control whose paths they are: 1 without a ladder."""
        return 1.0 if self.replay is None or self.replay.trust_region is None else float(self.replay.exponent)


def path_state(run: Run, paths: Any = "current", group_size: int | None = None) -> PathState:
    """The state of a method that learns from ``paths``.

    Raises:
        ValueError: a batch that is no multiple of ``group_size``.
    """
    if group_size is not None and run.batch_size % (group_size * ranks.parts()):
        times = "" if ranks.parts() == 1 else f" x {ranks.parts()} processes"
        raise ValueError(
            f"batch_size must be a multiple of group_size={group_size}{times} (paths that share a start), got "
            f"{run.batch_size}."
        )
    behaviour = None
    if paths != "current":
        behaviour = given_control(run.problem, None if isinstance(paths, str) else paths, "paths")
    return PathState(first_control(run), behaviour)


def collect(state: PathState, run: Run, part: int, group_size: int | None = None, until: int | None = None) -> Paths:
    """The paths of the ``part``-th batch of this iteration; ``group_size`` consecutive ones share start and
    condition."""
    batch = run.batch(part, group_size or 1)
    control = state.control if state.behaviour is None else state.behaviour
    return roll_out(run.problem, run.chain, control, batch.x0, batch.noise, batch.condition, until)


def moved(control: Control, laws: StepLaws) -> PerStep:
    """By how much every step's part of ``-log w`` has changed on stored paths, from the control that drew them to this
    one: in all ``log P^u/P^v``, with the control's part in the target where it has one.

    Args:
        laws: of ``control`` on these paths, at all steps or some.
    """
    own, whole = laws.paths.under(), laws
    if laws.steps is not None:
        with torch.no_grad():
            whole = laws.paths.under(control)
    return whole.less_reverse(whole.log_ratio).detach() - own.less_reverse(own.log_ratio)


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
    """A method that learns from paths, one part of the batch after another; whose, in what groups, how often and
    towards which targets are fields where they are a choice.

    Raises:
        ValueError: an unknown name, or a trust region that has no effect. TypeError: no control.
    """

    splits: ClassVar[bool] = True
    annealing: ClassVar[bool] = False
    #: whether paths are weighted: a trust region tempers the weights of every batch
    tempers: ClassVar[bool] = False
    paths: Any = "current"
    group_size: int | None = None
    trust_region: float | None = None
    replay: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.paths, str):
            check_name("paths", self.paths, PATHS)
        elif not callable(self.paths) and not callable(getattr(self.paths, "control", None)):
            raise TypeError(
                f"paths must be 'current', 'reference', or a control or solution whose paths to learn from; got "
                f"{type(self.paths).__name__}."
            )
        check_positive("trust_region", self.trust_region, optional=True)
        check_count("replay", self.replay, 0)
        if self.trust_region is not None and not self.replay and not self.tempers:
            raise ValueError(
                f"trust_region: without replay it only scales the gradient of {self.name}; say replay=4, for instance."
            )
        if self.rungs and self.paths != "current":
            raise ValueError(
                "trust_region with replay goes up from the current control's own law; leave paths='current', or leave "
                "trust_region out."
            )

    @property
    def anneals(self) -> bool:  # type: ignore[override]
        """A ladder goes up by itself."""
        return self.annealing and not self.rungs

    @property
    def rungs(self) -> bool:
        """Whether targets are those of a ladder."""
        return self.trust_region is not None and self.replay > 0

    @property
    def residual(self) -> bool:  # type: ignore[override]
        """Other paths than its own say nothing of the objective."""
        return self.paths != "current"

    @property
    def same_paths(self) -> int:  # type: ignore[override]
        """Those of a rung, at most."""
        return PASSES * self.replay if self.rungs else 1

    def group(self, run: Run) -> int | None:
        """Consecutive paths that share start and condition, among which they are compared; None: all."""
        return self.group_size

    def setup(self, run: Run) -> Any:
        group = self.group(run)
        state = path_state(run, self.paths, group)
        if self.replay:
            state.replay = Ladder(run, self.replay, self.trust_region, group)
        return state

    def step(self, state: Any, run: Run) -> dict[str, float]:
        parts: list[Paths] = []
        metrics: dict[str, float] = {}
        fresh = self.fresh(state, run)
        for part in range(run.accumulate):
            paths = fresh[part] if fresh else state.replay.again(run, part)
            parts.append(paths)
            if self.replay and fresh and not self.rungs:
                state.replay.add(paths)
                paths = state.replay.again(run, part)
            for name, value in self.learn(state, run, part, paths).items():
                metrics[name] = metrics.get(name, 0.0) + value / run.accumulate
        if self.rungs:
            metrics["exponent"] = state.exponent
        if self.tempers and run.iteration % 100 == 0:
            remedy = "Use trust_region=1.0, a larger batch or alpha, or better paths."
            warn_where_few(self.name, metrics["ess"], self.group_size or run.batch_size, remedy)
        run.descend(parts[0])
        return {**current_metrics(state, parts), **metrics}

    def fresh(self, state: Any, run: Run) -> list[Paths]:
        """New paths for this iteration; none on the way up a rung."""
        if state.replay is not None and not state.replay.asks:
            return []
        drawn = [collect(state, run, part, self.group(run)) for part in range(run.accumulate)]
        if state.replay is None or not state.replay.far(drawn):
            return drawn
        more = range(run.accumulate, self.replay)
        state.replay.begin([*drawn, *(collect(state, run, part, self.group(run)) for part in more)])
        return []

    def learn(self, state: Any, run: Run, part: int, paths: Paths) -> dict[str, float]:
        """Add the gradients of the ``part``-th batch of paths; its own metrics, of weighted paths "ess" and "exponent"
        among them."""
        raise NotImplementedError
