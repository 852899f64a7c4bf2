"""``ValueGuidance``: guidance by the gradient of a value function (tutorial Algorithm 4)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..chains.shifts import AllRows, shift_function
from ..controls.guidance import GivenValue, TweedieValue, ValueControl, value_network
from ..controls.token_guidance import guided_by
from ..errors import check_name
from ..paths.integrator import integrate
from ..paths.paths import Paths
from ..problems.differentiability import gradient_fault, missing_gradients, process_states
from ..problems.problem import ControlProblem
from ..processes.modules import copied
from ..randomness import Place, derive_seed, generator_for
from ..tensors import check_count
from .base import Batch, ControlState, Method, Run, not_differentiable, path_metrics, register
from .ratio_guidance import RatioState, ratio_state, ratio_step
from .ratio_tokens import TokenRatioState, token_ratio_step

_VALUES = ("monte-carlo", "soft-q", "tweedie", "ratio")


class ValueState(ControlState):
    """The value that is trained (inside the control), and soft Q-learning's slowly following copy of it."""

    def __init__(self, control: ValueControl, target: bool) -> None:
        super().__init__(control)
        self.target = copied(control.value).requires_grad_(False) if target else None


@register
@dataclass(frozen=True)
class ValueGuidance(Method):
    """``u = sigma^T grad v / alpha`` [27], the value v estimated first, or given; of tokens the value of each neighbour
    (:mod:`sdecontrol.controls.token_guidance`).

    Args:
        value: where v comes from.

            * "monte-carlo": regression of ``exp(v/alpha)`` on the exponential of what each path has still to come [28];
            * "soft-q": regression on one step and the value after it, ``exp(-h f/alpha) exp(v_{k+1}/alpha)``, of a
              slowly following copy [29]: less noise, and an error that is handed from step to step;
            * "ratio": ``v/alpha - log Z = log E[w | x_t]``, a log density ratio, by logistic regression on paths of the
              reference, weighted by w; then rounds on its own paths (:mod:`.ratio_guidance`). No gradient of the reward
              is needed; where there is one the value learns to see what the reward sees; of tokens every round is that
              regression (:mod:`.ratio_tokens`), without conditions;
            * "tweedie": ``r`` of the denoised state [31], nothing trained, with an error that never vanishes;
            * a function ``v(x, t) -> (batch,)``, t ``(batch,)``, such as an exact solution's ``value``.
        follow: how much of the trained value its copy takes over in every iteration of "soft-q".
        num_paths: of the reference, on which "ratio" is first fitted.

    Both regressions minimise the Itakura-Saito divergence ``E[Y e^-g + g]``, ``g = v/alpha``, in place of the print's
    squares: its minimiser is the same, ``e^g = E[Y | x]``, but it sees relative errors, so that states of tiny
    ``exp(v/alpha)`` count as others do. Half of the paths follow the current guidance; a quarter are the reference's up
    to a random step, so that nothing it visits is forgotten, and guided from there; a quarter are guided from perturbed
    starts, since a value at a point has no gradient. Y carries ``dQ0/dP^u`` of the guided steps, which changes no
    expectation and leaves the less noise the better the guidance; steps before a path is guided are not regressed on.
    """

    value: str | Callable[..., Tensor] = "monte-carlo"
    follow: float = 0.1
    num_paths: int = 16384

    gaussian: ClassVar[bool] = True
    tangential: ClassVar[bool] = True
    tokens: ClassVar[bool] = True
    takes_control: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.value, str):
            check_name("value", self.value, _VALUES)
        elif not callable(self.value):
            raise TypeError(
                f"value must be one of {', '.join(_VALUES)} or a function (x, t) -> (batch,), got "
                f"{type(self.value).__name__}."
            )
        check_count("num_paths", self.num_paths, least=256)
        if not 0 < self.follow <= 1:
            raise ValueError(f"follow must be in (0, 1], got {self.follow!r}.")

    @property
    def default_iterations(self) -> int:  # type: ignore[override]
        known = {"monte-carlo": 2000, "soft-q": 2000, "ratio": 5}
        return known.get(self.value, 0) if isinstance(self.value, str) else 0

    @property
    def steady(self) -> bool:  # type: ignore[override]
        return self.value == "ratio"

    def check(self, problem: ControlProblem) -> None:
        super().check(problem)
        if problem.reference.state_dtype is not None:
            if self.value == "ratio" and problem.condition is not None:
                raise ValueError(
                    "value-guidance with value='ratio' takes no conditions where states are tokens. Use "
                    "value='monte-carlo' or 'soft-q'."
                )
            return
        if self.value == "ratio" and not problem.reference.gaussian:
            raise ValueError(
                "value-guidance with value='ratio' learns a density ratio on R^d, and the states of a "
                f"{type(problem.reference).__name__} are no such. Use value='monte-carlo' or 'soft-q'."
            )
        if self.value == "tweedie" and (missing := missing_gradients(problem)):
            raise not_differentiable("value-guidance with value='tweedie'", problem, missing)

    def setup(self, run: Run) -> nn.Module:
        tokens = run.problem.reference.state_dtype is not None
        if self.value == "ratio" and not tokens:
            return ratio_state(run)
        if self.value == "tweedie":
            value = TweedieValue(run.problem, run.chain)
        elif callable(self.value):
            value = GivenValue(self.value, run.problem.alpha)
            if not tokens:
                _check_value(self, run.problem, value)
        else:
            value = value_network(run.problem, run.chain, derive_seed(run.seed, Place.GUIDANCE_VALUE))
        control = guided_by(value, run.problem, run.chain)
        if self.value == "ratio":
            return TokenRatioState(control)
        control.learning_rate = getattr(value, "learning_rate", control.learning_rate)
        return ValueState(control, self.value == "soft-q")

    def step(self, state: Any, run: Run) -> dict[str, float]:
        if isinstance(state, RatioState):
            return ratio_step(state, run, self.num_paths)
        if isinstance(state, TokenRatioState):
            return token_ratio_step(state, run, self.num_paths)
        value = state.control.value
        losses, parts = [], []
        for part in range(run.accumulate):
            batch = run.batch(part)
            paths, guided = roll(run, state.control, batch)
            with torch.no_grad():
                gains = paths.log_target() - paths.log_ratio(per_step=True)
                terminal = paths.reward / run.problem.alpha
                if state.target is None:  # all that is to come
                    aim = terminal + gains.flip(0).cumsum(0).flip(0)
                else:
                    later = state.target.along(paths.states[1:-1], paths.times[1:-1], paths.condition)
                    aim = gains + torch.cat((later, terminal.unsqueeze(0)))
            loss = itakura_saito(aim - value.along(paths.states[:-1], paths.times[:-1], paths.condition), guided)
            (loss / run.accumulate).backward()
            losses.append(float(loss.detach()))
            parts.append(paths.rows(slice(0, None, 2)))
        run.descend()
        if state.target is not None:
            with torch.no_grad():
                for theirs, ours in zip(state.target.parameters(), value.parameters()):
                    theirs.lerp_(ours, self.follow)
        return {**path_metrics(parts), "loss": sum(losses) / len(losses)}

    def finished(self, state: Any, run: Run) -> bool:
        return isinstance(state, (RatioState, TokenRatioState)) and bool(state.ended)


def _check_value(method: ValueGuidance, problem: ControlProblem, value: GivenValue) -> None:
    """Raise where a given value has no gradient, or another than its values have.

    Raises:
        NotDifferentiable: with what is wrong, and the methods that need none.
    """
    t, x = process_states(problem)[0]
    y = problem.draw_condition(len(x), 1)
    fault = gradient_fault(lambda z: value.at(z, z.new_tensor(t), y), x)
    if fault is not None:
        raise not_differentiable(method.name, problem, {"value": fault})


def itakura_saito(d: Tensor, use: Tensor) -> Tensor:
    """Mean of ``e^d - 1 - d`` over the entries in use, of ``d = log Y - g``, ``(K, batch)``: minimal where
    ``e^g = E[Y | x]``. Each step's part is divided by its mean of ``e^d`` where that is above 1 (far from the minimum),
    so that no gradient is large."""
    count = use.sum(1, keepdim=True)
    d = d.masked_fill(
        ~use, 0.0
    )  # before the exponential: the gradient of what overflows is nan even where it is masked after
    level = d.detach().masked_fill(~use, -torch.inf).logsumexp(1, keepdim=True) - count.to(d).log()
    level = level.clamp(min=0.0)
    return torch.where(use, (d - level).exp() - (1 + d) * (-level).exp(), 0.0).sum() / use.sum()


def roll(run: Run, control: Any, batch: Batch) -> tuple[Paths, Tensor]:
    """Paths of the current guidance, and which of their steps are guided, ``(K, batch)``: of four paths in a row the
    first and third are just that, the second has a perturbed start, the fourth is the reference's up to a random
    step."""
    chain, guidance, value = run.chain, shift_function(run.chain, control), control.value
    rows, generator = len(batch.x0), generator_for("cpu", batch.seed, Place.GUIDANCE_ROLL)
    begin = torch.randint(chain.steps, (rows,), generator=generator)
    begin[torch.arange(rows) % 4 != 3] = 0
    guided = (torch.arange(chain.steps).unsqueeze(1) >= begin).to(batch.x0.device)
    x0 = batch.x0.clone()
    if x0.is_floating_point():  # of tokens the neighbours are asked for, and these are visited
        away = torch.randn(x0[1::4].shape, generator=generator, dtype=torch.float64).to(x0)
        reference, shape = run.problem.reference, x0.shape[1:]
        spread = value.spread.reshape(shape) if reference.coordinate_spread is None else reference.coordinate_spread
        x0[1::4] = reference.onto(x0[1::4] + 0.5 * spread * away)

    def shift(k: int, x: Tensor, y: Any) -> Tensor:
        here = guided[k].nonzero().flatten()
        c = guidance(k, x[here], None if y is None else y[here])
        return chain.times.new_zeros((x.shape[0], *chain.noise_shape)).index_copy(0, here, c)

    f = run.problem.running_cost_or_none
    with torch.no_grad():
        paths = integrate(chain, x0, batch.noise, AllRows(shift), condition=batch.condition, running_cost=f)
    return paths.towards(run.problem), guided
