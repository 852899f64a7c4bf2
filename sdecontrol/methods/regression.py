"""What the methods that regress the control on a target share: the target's noise step by step, the loss, and its
step."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..controls.base import Control
from ..errors import NonFiniteError
from ..paths.lean_adjoint import StepJacobians
from ..paths.paths import Paths
from ..problems.simulate import roll_out
from ..problems.slope import reward_slope
from ..tensors import event_sum, nonfinite_rows
from .base import ControlState, Regression, Run, first_control, parameters_of

_AVERAGE = 0.1  # of the last batch in the running residuals


class RegressionState(ControlState):
    """State of a regression: the control, and running mean squares of the residual at every step."""

    def __init__(self, run: Run, control: Control | None = None) -> None:
        chain = run.chain
        if control is None:
            # least squares is damped relative to each feature; with a scaled Langevin term single paths go astray
            control = first_control(run, scale_langevin=False)
        super().__init__(control)
        self.residuals: Tensor
        self.since_taken_back: Tensor
        self.register_buffer("residuals", chain.times.new_zeros(chain.steps))
        self.register_buffer("since_taken_back", torch.zeros((), dtype=torch.long))  # iterations
        self.least_squares = bool(control.linear_parts())

    @property
    def knows_weights(self) -> bool:
        """Whether weights of the steps do not wait for the first residuals."""
        return self.least_squares or bool(self.residuals.any())

    def step_weights(self) -> Tensor:
        """Weights ``(K,)`` of the steps, of mean 1: inverse to the residual's mean square, as generalised least squares
        has them.

        The fixed point has every step's residual at its conditional mean, so weights move nothing but the noise: far
        from the end an adjoint may be a thousand times as noisy as near it.
        """
        if not bool(self.residuals.any()):
            return torch.ones_like(self.residuals)
        weights = 1 / (self.residuals + 1e-3 * self.residuals.mean())
        return weights / weights.mean()

    def outlying(self, huber: float | None) -> float | None:
        """How many times their median residuals may be long: bounds grow while nothing goes wrong, so that in the end
        the fixed point is that of squares (truncation at expanding bounds: Chen 2002, Stochastic Approximation and Its
        Applications)."""
        return None if huber is None else huber * (int(self.since_taken_back) + 1) ** 0.25

    def observe(self, residuals: Tensor) -> None:
        first = not bool(self.residuals.any())
        self.residuals.lerp_(residuals, 1.0 if first else _AVERAGE)


def controlled_paths(state: RegressionState, run: Run, part: int = 0) -> tuple[Paths, Tensor]:
    """Paths of the current control, without a graph, and their rewards' slopes as of :func:`reward_slope`.

    Where something of them is not finite the last steps may have gone too far: the parameters go back to the best so
    far, if there are any. If that does not help it was no step, and nothing is changed.
    """
    found, error = _tried(state, run, part)
    if error is None:
        return found
    if (undo := run.take_back()) is None:
        raise error
    found, error = _tried(state, run, part)
    if error is not None:
        undo()
        raise error
    state.since_taken_back.zero_()
    return found


def _tried(state: RegressionState, run: Run, part: int) -> tuple[Any, NonFiniteError | None]:
    """The paths, or what is not finite of them; or, of another process' part of the batch, that it is so there."""
    found, error = None, None
    try:
        found = _controlled(state, run, part)
    except NonFiniteError as own:
        error = own
    return found, ranks.first_error(error)


def _controlled(state: RegressionState, run: Run, part: int) -> tuple[Paths, Tensor]:
    batch = run.batch(part)
    paths = roll_out(run.problem, run.chain, state.control, batch.x0, batch.noise, batch.condition)
    _, slope = reward_slope(run.problem, paths)
    return paths, slope


def regress(
    state: RegressionState,
    run: Run,
    shifts: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    steps: Sequence[int] | None = None,
    most: Tensor | None = None,
) -> Tensor:
    """Add the gradient of ``E sum_k weight |c_k - y_k|^2/2`` for one batch, the steps weighted by
    :meth:`RegressionState.step_weights`.

    Args:
        shifts: ``(K, batch, *noise)`` with their graph; targets: the same shape (with a graph, if they have parameters
            too).
        weights: of the paths, ``(batch,)`` with mean 1. steps: take these steps only, as an unbiased estimate of all.
        most: :func:`longest_residuals` of every step, ``(K,)``: longer ones count linearly (Huber 1964), and those that
            are not finite not at all.

    Returns:
        The mean of ``|c_k - y_k|^2/2`` at each step, with path weights, ``(K,)``; detached.
    """
    squares = _squares(shifts - targets, len(run.chain.noise_shape), most)
    means = (squares if weights is None else squares * weights).mean(1)
    if not state.knows_weights:
        # Adam would remember the size of one unweighted gradient for a thousand steps; least squares is damped relative
        # to it
        state.observe(ranks.mean(means.detach()))
    by_step = state.step_weights() * means
    total = by_step.sum() if steps is None else by_step[list(steps)].sum() * (run.chain.steps / len(steps))
    # not to the states, too: their gradient serves nobody
    (total / run.accumulate).backward(inputs=parameters_of(state))
    return means.detach()


def regress_step(
    state: RegressionState, run: Run, j: int, shifts: Tensor, targets: Tensor, most: Tensor | None
) -> Tensor:
    """:func:`regress` of step j alone, with the weights that are known.

    Args:
        shifts: ``(batch, *noise)`` with their graph; targets: the same shape. most: ``(1,)``.

    Returns:
        The mean of ``|c_j - y_j|^2/2``, 0-d; detached.
    """
    mean = _squares((shifts - targets).unsqueeze(0), len(run.chain.noise_shape), most).mean()
    total = state.step_weights()[j] * mean
    (total / run.accumulate).backward(inputs=parameters_of(state))
    return mean.detach()


def _squares(residual: Tensor, ndim: int, most: Tensor | None) -> Tensor:
    """``|r|^2/2`` ``(K, batch)``; with bounds, Huber's function of ``|r|``."""
    squares = 0.5 * event_sum(residual**2, ndim)
    if most is None:
        return squares
    finite = squares.isfinite()
    if not bool(finite.all()):
        squares = 0.5 * event_sum(residual.where(finite.reshape(*finite.shape, *(1,) * ndim), 0.0) ** 2, ndim)
    bound = most.unsqueeze(1)
    far = squares.detach() > 0.5 * bound**2
    if not bool(far.any()):
        return squares
    return torch.where(far, bound * (2 * squares.where(far, 1.0)).sqrt() - 0.5 * bound**2, squares)


@torch.no_grad()
def longest_residuals(
    residuals: Tensor,
    jacobians: StepJacobians,
    slope: Tensor,
    costs: Tensor | None,
    alpha: float,
    times: float | None,
    step: int | None = None,
) -> Tensor | None:
    """How long residuals ``(K, batch, *noise)`` may be before they count as outliers, ``(K,)``: so many times their
    step's median, or the largest that slope and running costs make of an adjoint that does not grow, whichever is more.
    None: no bound.

    The adjoint of a path that lingers on a ridge between modes grows from step to step, to 1e8 times the usual and
    beyond any number: squares leave the regression to one path. Rewards and costs that few paths meet have a small
    median, too, but their adjoint is of their own size.

    Args:
        step: the residuals are of this one alone, ``(1, batch, *noise)``.

    Raises:
        NonFiniteError: a derivative that is not finite: that is no growth.
    """
    wrong = {"reward": nonfinite_rows(slope)}
    if costs is not None and not bool(costs.sum().isfinite()):
        wrong.update((f"running cost at step {j}", nonfinite_rows(cost)) for j, cost in enumerate(costs))
    if not bool(residuals.sum().isfinite()):  # by its size alone, perhaps
        wrong["drift"] = jacobians.nonfinite_rows()
    for name, rows in wrong.items():
        if rows:
            raise NonFiniteError(
                f"gradient of the {name} is not finite in {rows} rows; look for a sqrt or norm at 0.",
                what="gradient",
                rows=rows,
            )
    if times is None:
        return None
    ndim = len(jacobians.chain.noise_shape)
    source = slope.abs()
    if (each := jacobians.per_step(costs, alpha)) is not None:
        source = source + each.abs().sum(0)
    if step is None:
        plain = jacobians.scales_transposed(source.expand(jacobians.count, *source.shape))
    else:
        plain = jacobians.scale_transposed(step, source).unsqueeze(0)
    longest = ranks.whole(event_sum(residuals**2, ndim), 1).nan_to_num(torch.inf).median(1).values.sqrt()
    own = ranks.largest(event_sum(plain**2, ndim).amax(1)).sqrt()
    return torch.maximum(times * longest, own).clamp(max=torch.finfo(own.dtype).max ** 0.25)


def descend(
    state: RegressionState,
    run: Run,
    parts: Sequence[Paths],
    means: list[Tensor],
    weights: Tensor | None = None,
) -> float:
    """One step from the gradients of all parts, least squares where the control is linear.

    Args:
        parts: of the current control, if they know their target (:meth:`Paths.towards`). means: as :func:`regress`
            gives them. weights: of the paths of all parts.

    Returns:
        The loss, all steps alike.
    """
    objective = None
    if parts[0].target is not None:
        objective = ranks.whole(torch.cat([p.reward - p.cost - p.alpha * p.kl() for p in parts]))
    mean = ranks.mean(torch.stack(means).mean(0))
    step_weights = state.step_weights()
    states = torch.cat([paths.states[:-1] for paths in parts], 1)
    y = None if parts[0].condition is None else torch.cat([paths.condition for paths in parts])
    loss = float((step_weights * mean).sum())
    if run.descend(Regression(parts[0].chain, states, y, loss, weights, step_weights, objective)):
        state.observe(mean)
        state.since_taken_back += 1
    else:
        state.since_taken_back.zero_()
    return float(mean.sum())
