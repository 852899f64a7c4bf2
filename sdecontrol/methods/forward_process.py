"""What the forward-process methods share: clean ends of the model, noised anew, and regressions of the tuned
prediction on them that are anchored on the pre-trained one.

Let ``z_k = E[xi_k | x_k, x_K]`` be the noise of step k given an end under the noising process (``chains/noising.py``),
relative to the reference. Were the reference the exact reversal of the noising, ``E[z_k | x_k]`` would be 0 under it,
and ``u_k(x_k)`` on noised ends of a control u that tilts its end. A pre-trained model is not: on noised ends of its own
there is ``a_k(x) = E[z_k | x_k]``, and every regression on z pays for it in path KL (on digits 4 to 5 nats, whatever
the reward). So a, the anchor, is learned by a second control of the same class on the same draws, and z - a takes the
place of z.

* :func:`anchored_target`: ends with weights w towards Q_fine and rho towards the reference. The anchor is the
  rho-weighted regression on z, and the control the w-weighted one on ``z - a`` less its part that the smallest ratio of
  the weights knows to have mean 0: ``E[w (z - a) | x]/E[w | x]``.
* :func:`scored_target`: ends of the current control, and a coefficient zeta. The anchor is the plain regression, and
  the control that on ``zeta (z - a)``: ``Cov(zeta, z_k | x_k)``.

Both are least squares with weights that are not negative and targets that the anchor's error moves by no more than
itself (times ``|zeta|`` in the second): nothing is divided by what a network has learned. Equal rewards make all
targets 0, and so leave exactly the pre-trained model, whatever the anchor.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ranks
from ..chains.bridges import ChainBridge
from ..chains.masking import MaskingBridge
from ..chains.noising import NoisingBridge
from ..chains.shifts import shifts_along
from ..controls.base import Control
from ..controls.build import build_control
from ..controls.guidance import denoiser_on_chain
from ..paths.weights import leave_one_out
from ..randomness import Place, derive_seed
from ..tensors import event_sum
from .base import Run, parameters_of
from .regression import RegressionState

#: what draws the middle of a path anew given its end
Bridge = ChainBridge | NoisingBridge | MaskingBridge
#: iterations in which the anchor learns before the control moves
WARM_UP = 20


class Ends(NamedTuple):
    """A batch of them, with the paths' starts and conditions."""

    start: Tensor
    end: Tensor
    condition: Any = None


def anchor_of(run: Run) -> Control:
    """A second control of the same class, which begins at the pre-trained model."""
    given = run.control if isinstance(run.control, str) else None
    return build_control(run.problem, run.chain, given, seed=derive_seed(run.seed, Place.BRIDGE_ANCHOR))


class ForwardState(RegressionState):
    """The control, what draws the middle of a path given its end (None: nothing known does), and, for a pre-trained
    model of numbers, the anchor; and what :class:`~.on_paths.PathMethod` asks of a state."""

    def __init__(self, run: Run, control: Control, bridge: Bridge | None, anchor: bool) -> None:
        super().__init__(run, control)
        self.bridge = bridge
        exact = run.problem.reference.mixture is not None or not isinstance(bridge, NoisingBridge)
        self.anchor = anchor_of(run) if anchor and not exact else None
        self.behaviour: Control | None = None
        self.replay = None

    def learns(self, run: Run) -> bool:
        """Whether the control moves in this iteration."""
        return self.anchor is None or run.iteration >= WARM_UP


class Noised:
    """One batch of ends, noised anew.

    Attributes:
        given: steps of the chain, whose states ``(steps, batch, *event)`` these are; None: all. z: ``E[xi_k | x_k,
            x_K]`` there. a: the anchor there, with its graph; 0 where there is none.
    """

    def __init__(
        self,
        state: ForwardState,
        run: Run,
        ends: Ends,
        generator: torch.Generator,
        steps: Sequence[int] | None = None,
        joint: bool = False,
    ) -> None:
        """``joint``: states of one path each, else independent of one another."""
        assert isinstance(state.bridge, NoisingBridge)
        (start, self.end, self.y), self.chain, self.given = ends, run.chain, steps
        self.bridge = state.bridge
        self.steps = list(range(run.chain.steps) if steps is None else steps)
        self.share = run.chain.steps / len(self.steps)
        noise = ranks.own_normals((len(self.steps), *self.end.shape), 1, generator, self.end)
        draw = self.bridge.path_given_end if joint else self.bridge.between
        self.states = draw(start, self.end, noise, steps)
        self.z = self.bridge.noise_given_end(self.states, self.end, self.y, steps)
        self.a = torch.zeros_like(self.z) if state.anchor is None else self.shifts(state.anchor)

    def shifts(self, control: Control) -> Tensor:
        return shifts_along(self.chain, control, self.states, self.y, steps=self.given)

    def half_square(self, v: Tensor) -> Tensor:
        return 0.5 * event_sum(v**2, len(self.chain.noise_shape))


def anchored_target(z: Tensor, a: Tensor, log_ratio: Tensor) -> Tensor:
    """``(z - a)(1 - m rho/w)``, m the smallest ``w/rho`` of the batch.

    The w-weighted regression on it has the gradient of that on ``z - a`` plus ``m rho (z - a)``, of mean 0 given the
    state, which takes the noise out where the weights are even. Since ``m <= w/rho``, the factor is in [0, 1]; a
    learned ``E[w | x]/E[rho | x]`` in m's place would take out more, but where it is too high by a factor it moves the
    control by that factor times the anchor's error, without a bound.

    Args:
        log_ratio: ``log(w/rho)`` ``(batch,)``.
    """
    keep = -torch.expm1(-ranks.largest(-log_ratio.min()) - log_ratio)
    return keep.to(z.dtype).reshape(-1, *(1,) * (z.ndim - 2)) * (z - a)


def expected_reward(run: Run, noised: Noised) -> Tensor | None:
    """``r(x0^)/alpha`` ``(steps, batch)`` at the data that the pre-trained model expects; None of a black box."""
    problem, chain = run.problem, run.chain
    if not problem.has_gradient:
        return None
    denoise = denoiser_on_chain(problem.reference, chain)
    data = problem.reference.data_of  # type: ignore[attr-defined]
    with torch.no_grad():
        seen = [data(denoise(k, x, noised.y), noised.y) for k, x in zip(noised.steps, noised.states)]
        return torch.stack([problem.reward(x0, noised.y) for x0 in seen]) / problem.alpha


def unexpected(zeta: Tensor, seen: Tensor | None) -> Tensor:
    """``zeta`` ``(batch,)`` less its least-squares prediction from ``seen`` ``(steps, batch)``, as the other paths have
    it, step by step: what is taken away is a function of a path's own state and of other paths, by which the mean of
    ``zeta (z - a)`` given the state does not change. None: less the mean of the others."""
    if seen is None:
        return leave_one_out(zeta)
    zeta, seen = ranks.whole(zeta), ranks.whole(seen, -1)
    z, b, n = zeta - zeta.mean(), seen - seen.mean(1, keepdim=True), zeta.shape[0]
    others = lambda v: v.sum(1, keepdim=True) - n / (n - 1) * v  # noqa: E731
    slope = others(b * z) / others(b * b).clamp(min=torch.finfo(b.dtype).tiny)
    return ranks.own(n / (n - 1) * (z - slope * b), -1)


def scored_target(noised: Noised, zeta: Tensor, a: Tensor, cost: Tensor | None) -> Tensor:
    """``zeta (z_k - a_k)``, less ``sum_{j > k} cost_j (E[xi_k | x_k, x_j] - a_k)``.

    A cost of step j is a function of x_j: of the later noise it knows what x_j does. (Paired with
    ``E[xi_k | x_k, x_K]``, as the reward is, it has another covariance with the noise of step k, and the fixed point is
    another law.) All of these means have the same expectation given x_k, so that one anchor serves them.

    Args:
        cost: ``|c_j|^2/2`` ``(steps, batch)`` on joint paths; None: no path cost.
    """
    wide = (..., *(None,) * (noised.z.ndim - 2))
    target = zeta[wide] * (noised.z - a)  # zeta of the path, or of each of its steps
    if cost is None:
        return target
    others = max(1, len(noised.steps) - 1)  # of which the later ones stand for all later ones
    cost = leave_one_out(cost) * ((noised.chain.steps - 1) / others)
    paired = noised.bridge.noise_given_later(noised.states, noised.end, noised.z, cost, noised.given)
    still = cost.flip(0).cumsum(0).flip(0) - cost
    return target - (paired - still[wide] * a)


def regress_both(
    state: ForwardState,
    run: Run,
    noised: Noised,
    targets: Tensor,
    weights: Tensor,
    others: Tensor,
    shifts: Tensor | None = None,
) -> float:
    """Add the gradients of ``sum_k s_k E[weights |c_k - target|^2/2 + others |a_k - z_k|^2/2]``, ``s_k`` for an
    anchored regression inversely proportional to the anchor's residuals, else 1; the loss of the control, all steps
    alike.

    Args:
        shifts: of the control, with their graph, where they are known.
    """
    rows, total = noised.steps, targets.new_zeros(())
    by_step = torch.ones_like(state.residuals)
    if state.anchor is not None:
        residuals = (others * noised.half_square(noised.a - noised.z)).mean(1)
        _observe(state, rows, ranks.mean(residuals.detach()))
        by_step = state.step_weights()
        total = total + (by_step[rows] * residuals).sum()
    loss = 0.0
    if state.learns(run):
        c = noised.shifts(state.control) if shifts is None else shifts
        squares = (weights * noised.half_square(c - targets)).mean(1)
        total, loss = total + (by_step[rows] * squares).sum(), float(squares.detach().sum()) * noised.share
    (total * noised.share / run.accumulate).backward(inputs=parameters_of(state))
    return loss


def _observe(state: ForwardState, rows: list[int], means: Tensor) -> None:
    """Running residuals of some steps; where none are known yet, their mean stands for those of the others."""
    known = state.residuals.clone()
    if not bool(known.any()):
        known.fill_(float(means.mean()))
        known[rows] = means
    known[rows] = known[rows].lerp(means, 0.1)
    state.residuals.copy_(known)
