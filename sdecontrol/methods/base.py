"""What a method is: a frozen dataclass of its own settings that knows paths, problems and controls, and nothing else.

It meets the training loop in three calls: ``setup(run)`` makes its state, an nn.Module that holds everything training
changes; ``step(state, run)`` does one iteration and returns metrics; ``finish(state, run)`` gives the control.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .. import ranks
from ..chains.base import Chain
from ..controls.base import Control
from ..controls.build import build_control
from ..errors import NotDifferentiable, check_name
from ..evaluation.solution import Solution
from ..paths.paths import Paths
from ..problems.differentiability import missing_gradients
from ..problems.problem import ZERO_WEIGHTS, ControlProblem
from ..problems.reward_groups import reward_groups
from ..randomness import Place, SeededNoise, derive_seed
from .linear_start import linear_start

#: what every method on paths of the current control reports
METRICS = ("objective", "objective_stderr", "reward", "running_cost", "kl")
_PROMPTS = 64  # at most, of which each is reported in every iteration


@dataclass
class Batch:
    """What a batch of paths starts from: states, noise and conditions, all functions of one seed and of a path's place
    in the batch."""

    x0: Tensor
    noise: SeededNoise
    condition: Any
    seed: int


@dataclass(frozen=True)
class Regression:
    """A loss ``E sum_k weight |c_k(x_k) - y_k|^2/2`` whose gradients a method has made: then the parameters in which
    the control is linear are moved by least squares.

    Attributes:
        states: ``(K, batch, *event)`` of all steps of the chain.
        loss: its value, by which the next steps are damped more or less.
        weights: of the paths, ``(batch,)`` with mean 1; None: all 1.
        objective: of the paths of the current control, ``(batch,)``, where the batch has them: a step after which it
            has clearly fallen is taken back.
    """

    chain: Chain
    states: Tensor
    condition: Any
    loss: float
    weights: Tensor | None = None
    step_weights: Tensor | None = None
    objective: Tensor | None = None


class Visited(NamedTuple):
    """States ``(K, rows, *event)`` of all steps of a few paths, and their conditions."""

    states: Tensor
    condition: Any

    @classmethod
    def of(cls, states: Tensor, condition: Any) -> "Visited":
        """A quarter of the paths, four at least."""
        few = spread(states.shape[1], few_of(states.shape[1]))
        return cls(states[:, few].detach(), None if condition is None else condition[few])


def few_of(batch: int) -> int:
    """How many paths of a batch say how far a step moves the path law."""
    return max(4, -(-batch // 4))


def spread(count: int, few: int, first: int = 0) -> slice:
    """Rows at equal distances, ``few`` of ``count`` or more. Distances are a power of two, and 16 at most: so each
    process has as many of them in its own blocks of 64 rows, and the same ones however many processes there are."""
    distance = min(16, 1 << max(0, (count // few).bit_length() - 1)) if few else 1
    return slice(first % distance, None, distance)


@dataclass
class Run:
    """What a method sees of a run.

    Attributes:
        batch_size: paths per gradient, of all processes together; ``accumulate`` of them make one step.
        control: the user's own control, or None.
        iteration: number of the current iteration.
        descend: take one optimiser step from the gradients of the state's parameters (checked to be finite); given a
            :class:`Regression`, with least squares for the control's linear parameters. False where the last step was
            taken back instead. Given that, :class:`Paths` or :class:`Visited`, no step moves the path law too far.
        take_back: put a regression's best parameters so far in place, and take smaller steps from there. What undoes
            it, or None where there are none.
        elapsed: the part of a budget of time that has passed; None where there is none.
    """

    problem: ControlProblem
    chain: Chain
    batch_size: int
    accumulate: int
    seed: int
    control: Any = None
    iteration: int = 0
    descend: Callable[..., bool] = field(default=lambda *at: True)
    take_back: Callable[[], Callable[[], None] | None] = field(default=lambda: None)
    elapsed: Callable[[], float] | None = None

    def batch(self, part: int = 0, group_size: int = 1) -> Batch:
        """The ``part``-th batch of this iteration; of several processes that split it, the own rows.

        Args:
            group_size: so many consecutive paths share start and condition.
        """
        seed = derive_seed(self.seed, Place.BATCH, self.iteration, part)
        chain, problem, rows = self.chain, self.problem, ranks.own_rows(self.batch_size)
        noise = SeededNoise(
            seed, self.batch_size, chain.steps, chain.noise_shape, dtype=chain.times.dtype, device=chain.times.device
        )
        x0, y = problem.draw_start(self.batch_size, seed), problem.draw_condition(self.batch_size, seed)
        noise = noise.rows(rows.start, rows.stop)
        if group_size == 1:
            return Batch(x0[rows], noise, None if y is None else y[rows], seed)
        first = torch.arange(rows.start, rows.stop, device=x0.device) // group_size
        # a reverse law leads to the start: with one Y is constant over all of them
        x0 = x0[first] if chain.reverse is None else x0[rows]
        return Batch(x0, noise, None if y is None else y[first], seed)


class ControlState(nn.Module):
    """State of a method that trains a control and nothing else."""

    def __init__(self, control: Control) -> None:
        super().__init__()
        self.control = control


def first_control(run: Run, *, scale_langevin: bool = True) -> Control:
    """What a run's control is at first: the user's, or one of the library's, which begins with a regulator of the
    linearised problem where the drift is unstable (``methods/linear_start.py``)."""
    feedback = None if run.control is not None else linear_start(run.problem, run.chain, run.seed)
    return build_control(
        run.problem, run.chain, run.control, seed=run.seed, scale_langevin=scale_langevin, feedback=feedback
    )


@dataclass(frozen=True)
class Method:
    """Base of all methods."""

    #: iterations at most, where the user gives none
    default_iterations: ClassVar[int] = 2000
    #: whether reward, running cost and steps must have gradients
    needs_gradient: ClassVar[bool] = False
    #: whether progress shows in the loss, a residual that is 0 at the optimum, rather than in the objective
    residual: ClassVar[bool] = False
    #: consecutive iterations whose metrics may be of the same paths
    same_paths: ClassVar[int] = 1
    #: whether a run has its default length, since no metric of an iteration says when there is no more to gain
    steady: ClassVar[bool] = False
    #: whether it says itself, in the metrics "gain" and "gain_stderr" of some iterations, how many nats all those since
    #: the last time have gained
    measures_gain: ClassVar[bool] = False
    #: a metric that each iteration estimates afresh, which the progress bar then shows; None: the objective, averaged
    estimates: ClassVar[str | None] = None
    #: decay of the average of the parameters over iterations
    averaging: ClassVar[float] = 0.99
    #: whether it gains from higher temperatures first: what sees a target far from its paths through few of them does
    anneals: ClassVar[bool] = False
    #: whether a run that is interrupted (Ctrl-C) gives the solution of what was done
    anytime: ClassVar[bool] = False
    #: whether what it trains is a control, which may be given
    takes_control: ClassVar[bool] = True
    #: whether the target's steps must be the reference's own: a value function, an adjoint or bridges have no reverse
    #: law
    reference_steps: ClassVar[bool] = True
    #: whether the target must not depend on the control
    fixed_target: ClassVar[bool] = True
    #: whether paths of weight 0 are taken, whose reward is -inf
    zero_weights: ClassVar[bool] = False
    #: whether several processes may split its batches: whatever it decides is then made of all rows (``ranks.py``)
    splits: ClassVar[bool] = False
    #: whether steps must be Gaussian kernels, whose means a control moves; or at least functions of a noise that it
    #: shifts
    gaussian: ClassVar[bool] = False
    of_noise: ClassVar[bool] = False
    #: whether Gaussian kernels may be those of a tangent space
    tangential: ClassVar[bool] = False
    #: whether it has a form of its own for tokens, whose probabilities a control tilts; for masked ones alone
    tokens: ClassVar[bool] = False
    masked_tokens: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return kebab(type(self).__name__)

    def check(self, problem: ControlProblem) -> None:
        """Raise early where the problem is none for this method."""
        if problem.reference.reverse_target and self.reference_steps:
            raise ValueError(
                f"{self.name} does not take reference='annealed': it uses a value function, the adjoint or bridges of "
                "the reference, and a target made of backward kernels has none of these. Use log-variance, "
                "reward-backprop, path-consistency with n='all', reinforce or smc; or reference='ou' or 'brownian'."
            )
        if problem.reference.controlled_target and self.fixed_target:
            raise ValueError(
                f"{self.name} fits a control to a target that must not depend on it, but with reference='annealed' the "
                "control has a part in the backward kernels. Use log-variance or reward-backprop, or "
                "gibbs_problem(..., backward_control=False)."
            )
        if problem.vanishes and not self.zero_weights:
            raise ValueError(
                f"{self.name} needs a reward that is a number everywhere, and this one is -inf at some states. "
                f"{ZERO_WEIGHTS}"
            )
        kind = type(problem.reference).__name__
        if problem.reference.state_dtype is not None and (
            self.tokens or (self.masked_tokens and problem.reference.keeps_tokens)
        ):
            return
        if self.gaussian and not (problem.reference.gaussian or (self.tangential and problem.reference.tangential)):
            raise ValueError(
                f"{self.name} moves the means of Gaussian kernels, and the steps of a {kind} are none. Use "
                "log-variance, soft-ppo, cross-entropy, path-consistency, reinforce or smc."
            )
        if self.of_noise and not problem.reference.of_noise:
            raise ValueError(
                f"{self.name} shifts the noise of steps, and a {kind} has kernels of another kind. Use log-variance, "
                "soft-ppo, cross-entropy, path-consistency, reinforce or smc."
            )
        if self.needs_gradient and (missing := missing_gradients(problem)):
            raise not_differentiable(self.name, problem, missing)

    def prepare(self, problem: ControlProblem) -> tuple["Method", ControlProblem]:
        """The method that is to run, and the problem that it is about, before anything is asked of that."""
        return self, problem

    def setup(self, run: Run) -> nn.Module:
        return ControlState(first_control(run))

    def step(self, state: Any, run: Run) -> dict[str, float]:
        raise NotImplementedError

    def finished(self, state: Any, run: Run) -> bool:
        """Whether there is no more to do, asked after every iteration."""
        return False

    def finish(self, state: Any, run: Run) -> Control:
        return state.control

    def solution(self, state: Any, run: Run, problem: ControlProblem, **facts: Any) -> Solution:
        """What the run gives: by ``make_solution(problem, control, **facts)`` of a method that samples in a way of its
        own."""
        make = getattr(self, "make_solution", Solution)
        return make(problem, self.finish(state, run), **facts)


METHODS: dict[str, type[Method]] = {}

#: methods that need no gradient, in the order of their measured errors (docs/methods_closer.md); "auto" for
#: densities alone
GRADIENT_FREE = ("auto", "log-variance", "cross-entropy", "soft-ppo", "particle-matching")


def gradient_free(problem: ControlProblem) -> list[str]:
    """Those of :data:`GRADIENT_FREE` that take the problem."""
    found = []
    for name in GRADIENT_FREE:
        if name in METHODS and (name != "auto" or problem.density is not None):
            with contextlib.suppress(ValueError, TypeError):
                find_method(name).check(problem)
                found.append(name)
    return found


def not_differentiable(asking: str, problem: ControlProblem, missing: Mapping[str, str]) -> NotDifferentiable:
    """The error of a method that needs gradients where some are ``missing`` (name -> why)."""
    listed = "; ".join(f"{name} has no gradient to go by: {why}" for name, why in missing.items())
    free = gradient_free(problem)
    theirs = [name for name in missing if name != "stop"]  # no smooth function stops a path
    return NotDifferentiable(
        f"{asking} needs gradients, but {listed}. Use a method that needs none"
        + (f" ({', '.join(free)}; sc.recommend says which)" if free else " (sc.recommend says which)")
        + (f", or write {' and '.join(theirs)} in smooth torch operations." if theirs else ".")
    )


def kebab(name: str) -> str:
    """``RewardBackprop`` -> ``reward-backprop``, ``SoftPPO`` -> ``soft-ppo``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).lower()


_M = TypeVar("_M", bound=Method)


def register(cls: type[_M]) -> type[_M]:
    """Make a method known by its name in kebab case."""
    METHODS[kebab(cls.__name__)] = cls
    return cls


_ALIASES: dict[str, Callable[[], Method]] = {}


def also_named(**makers: Callable[[], Method]) -> None:
    """Further names by which a field knows a method with certain settings (``a_b`` for "a-b")."""
    _ALIASES.update({name.replace("_", "-"): make for name, make in makers.items()})


def method_names() -> list[str]:
    return sorted(METHODS)


def find_method(method: Any) -> Method:
    """A method from itself, its class, or its name (also one of :func:`also_named`).

    Raises:
        ValueError: unknown name, with the nearest ones. TypeError: something else.
    """
    if isinstance(method, Method):
        return method
    if isinstance(method, type) and issubclass(method, Method):
        return method()
    if isinstance(method, str):
        known: dict[str, Callable[[], Method]] = {**METHODS, **_ALIASES}
        check_name("method", method, known)
        return known[method]()
    raise TypeError(f"method must be a method such as sc.RewardBackprop() or its name, got {type(method).__name__}.")


@dataclass(frozen=True)
class Suggestion:
    """A method and why.

    Attributes:
        settings: of ``solve`` beside it ("control", "batch_size"), where they are not its defaults.
    """

    method: Method
    reason: str
    settings: Mapping[str, Any] = field(default_factory=dict)


_ADVISERS: list[Callable[..., Iterable[Suggestion]]] = []
_A = TypeVar("_A", bound=Callable[..., Iterable[Suggestion]])


def advises(function: _A) -> _A:
    """Let ``function(problem, time_steps=..., batch_size=..., control=...)`` suggest methods where a user names none;
    the one registered last."""
    _ADVISERS.append(function)
    return function


def suggested(problem: ControlProblem, **settings: Any) -> list[Suggestion]:
    """Methods for a problem by the adviser that is registered, the first choice first.

    Raises:
        ValueError: there is none that the problem's methods accept.
    """
    found = list(_ADVISERS[-1](problem, **settings)) if _ADVISERS else []
    if not found:
        raise ValueError("method is missing, and no method is known to suit this problem by itself; name one.")
    return found


def path_metrics(parts: Sequence[Paths]) -> dict[str, float]:
    """The metrics of :data:`METRICS`, and the lower bound of log Z in nats by the same paths ("elbo", "elbo_stderr"),
    from all parts of a batch."""
    fields = ((p.reward, p.cost, p.kl(), p.log_ratio()) for p in parts)
    rewards, costs, kls, ratios = map(torch.cat, zip(*fields))
    found = metrics_of(rewards, costs, kls, parts[0].alpha, ratios)
    problem: Any = parts[0].target
    return {**found, **named_means(problem, [(p.reward, p.reward_parts, p.condition) for p in parts])}


def named_means(problem: ControlProblem, seen: Sequence[tuple[Tensor, Tensor | None, Any]]) -> dict[str, float]:
    """The means of :func:`reward_groups`, from rewards, their parts and conditions, batch by batch."""
    rewards, parts, conditions = zip(*seen)
    several = None if any(part is None for part in parts) else torch.cat(parts)
    y = None if conditions[0] is None else torch.cat(conditions)
    groups = reward_groups(problem, torch.cat(rewards), several, y, most=_PROMPTS)
    if not groups:
        return {}
    sums = torch.stack([values.double().sum() for values in groups.values()])
    sums, counts = ranks.whole_sum(torch.stack((sums, sums.new_tensor([len(v) for v in groups.values()])))).tolist()
    return {name: total / count for name, total, count in zip(groups, sums, counts) if count}


def metrics_of(
    reward: Tensor, running_cost: Tensor, kl: Tensor, alpha: float, log_ratio: Tensor | None = None
) -> dict[str, float]:
    """The same from their parts, ``(batch,)`` (of a batch that is split, the own rows). The mean
    log-weight has the mean of objective / alpha; its noise, not that of the objective, vanishes as the control nears
    the optimum."""
    found = {}
    if log_ratio is None:
        reward, running_cost, kl = ranks.wholes(reward, running_cost, kl)
    else:
        reward, running_cost, kl, log_ratio = ranks.wholes(reward, running_cost, kl, log_ratio)
        found["elbo"], found["elbo_stderr"] = _mean((reward - running_cost) / alpha - log_ratio)
    objective, error = _mean(reward - running_cost - alpha * kl)
    return {
        "objective": objective,
        "objective_stderr": error,
        "reward": float(reward.mean()),
        "running_cost": float(running_cost.mean()),
        "kl": float(kl.mean()),
        **found,
    }


def _mean(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / len(values) ** 0.5 if len(values) > 1 else math.nan


def parameters_of(state: nn.Module) -> list[Tensor]:
    """The parameters that training changes."""
    return [p for p in state.parameters() if p.requires_grad]
