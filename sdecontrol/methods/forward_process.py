"""What the forward-process methods share: clean ends of the model, noised anew, and regressions of the tuned
prediction on them that are anchored on the pre-trained one.

Let ``z_k = E[xi_k | x_k, x_K]`` be the noise of step k given an end under the noising process (``chains/bridges.py``),
relative to the reference. Were the reference the exact reversal of the noising, ``E[z_k | x_k]`` would be 0 under it,
and ``u_k(x_k)`` on noised ends of a control u that tilts its end. A pre-trained model is not: on noised ends of its own
there is ``a_k(x) = E[z_k | x_k]``, and every regression on z pays for it in path KL (on digits 4 to 5 nats, whatever
the reward). So a is learned, on the same draws, by a second control of the same class, beside a baseline: a function b
of the denoised state and time.

* :func:`weighted_regression`: weights w towards Q_fine, rho towards the reference, b for ``E[w | x]/E[rho | x]``::

      argmin over c of  E[ w |c|^2/2 - (w - rho b_k(x_k)) c . (z_k - a_k(x_k)) ]  =  E[w (z - a) | x] / E[w | x]

* :func:`scored_regression`: on ends of the current control, a for ``E[z | x]`` on them, a coefficient zeta, b for
  ``E[zeta | x]``::

      argmin over c of  E[ |c|^2/2 - (zeta_k - b_k(x_k)) c . (z_k - a_k(x_k)) ]  =  Cov(zeta_k, z_k | x_k)

  (Published forms have the control itself for a: where the baseline is more than one nat too high, that drives the
  control away from what it should be.)

Equal rewards give w = rho = b = 1, or zeta = b, and so exactly the pre-trained model, for every a. Errors of a and of b
enter as their product, since either alone makes the minimiser right; b also takes out the part of the noise that the
state knows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..chains.bridges import ChainBridge, NoisingBridge, bridge_of
from ..chains.shifts import ShiftFunction, shift_function
from ..controls.build import build_control
from ..controls.values import learned_value
from ..memory import remembering
from ..paths.paths import Paths
from ..paths.weights import leave_one_out
from ..precision import full_precision
from ..randomness import Place, derive_seed, generator_for
from ..tensors import event_sum
from .base import Run, parameters_of
from .regression import RegressionState

#: iterations in which anchor and baseline learn before the control moves
WARM_UP = 20


class ForwardState(RegressionState):
    """The control, the one whose ends it learns from (None: its own), and, for a pre-trained model, anchor and
    baseline."""

    def __init__(self, run: Run, control: Any, behaviour: Any, anchored: bool) -> None:
        super().__init__(run, control)
        self.behaviour, self.replay = behaviour, None
        self.bridge: ChainBridge | NoisingBridge = bridge_of(run.chain, run.problem.start)
        self.anchor = self.value = None
        if anchored and isinstance(self.bridge, NoisingBridge):
            self.anchor = build_control(run.problem, run.chain, seed=derive_seed(run.seed, Place.BRIDGE_ANCHOR))
            self.value = learned_value(run.problem, run.chain, derive_seed(run.seed, Place.BRIDGE_VALUE))
            self.value.scale[0] = 0.0  # it begins at nothing

    def learns(self, run: Run) -> bool:
        """Whether the control moves in this iteration."""
        return self.anchor is None or run.iteration >= WARM_UP


def noised(
    state: ForwardState, run: Run, paths: Paths, part: int, steps: Sequence[int] | None, joint: bool = False
) -> Tensor:
    """States of these steps, ``(steps, batch, *event)``, drawn anew given the ends of paths; ``joint``: those of one
    path each, else independent of one another."""
    end, chain = paths.end, run.chain
    whole = steps is None or (joint and isinstance(state.bridge, ChainBridge))
    generator = generator_for(end.device, run.seed, Place.BRIDGES, run.iteration, part)
    shape = (chain.steps if whole else len(steps or ()), *end.shape)
    noise = torch.randn(shape, generator=generator, dtype=end.dtype, device=end.device)
    if not joint:
        return state.bridge.between(paths.states[0], end, noise, steps)
    return state.bridge.path_given_end(paths.states[0], end, noise, range(chain.steps) if steps is None else steps)


class _Steps:
    """One batch of noised states: step by step the control, the score and what the anchor's regression costs."""

    def __init__(
        self, state: ForwardState, run: Run, paths: Paths, states: Tensor, steps: Sequence[int] | None
    ) -> None:
        chain, self.state, self.run = run.chain, state, run
        self.states, self.end, self.y = states, paths.end, paths.condition
        self.every = list(range(chain.steps)) if steps is None else list(steps)
        self.share = chain.steps / len(self.every)
        self.own = shift_function(chain, state.control)
        self.anchor: ShiftFunction | None = None if state.anchor is None else shift_function(chain, state.anchor)
        self.means = torch.zeros_like(state.residuals)

    def __iter__(self) -> Any:
        """``(row, k, c, z, a)`` of every step; a without an anchor is 0."""
        bridge, y = self.state.bridge, self.y
        for row, (k, x) in enumerate(zip(self.every, self.states.unbind(0))):
            with remembering():
                c = self.own(k, x, y)
                if isinstance(bridge, NoisingBridge):
                    with torch.no_grad():
                        z = bridge.noise_at(k, x, self.end, y)
                else:
                    z = bridge.noise_given_end(x.unsqueeze(0), self.end, y, [k])[0]
                a = torch.zeros_like(c) if self.anchor is None else self.anchor(k, x, y)
            yield row, k, c, z, a

    def square(self, v: Tensor) -> Tensor:
        return 0.5 * event_sum(v**2, len(self.run.chain.noise_shape))

    def product(self, v: Tensor, w: Tensor) -> Tensor:
        return event_sum(v * w, len(self.run.chain.noise_shape))

    def observe(self, k: int, residual: Tensor) -> None:
        self.means[k] = self.square(residual.detach()).mean()

    def expected(self, weights: Tensor, others: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The loss of the baseline, and what it expects, ``(steps, batch)`` without a graph: of ``weights`` relative to
        ``others``, by the logistic loss, whose minimiser is ``log E[w | x]/E[rho | x]``; without others, by squares. No
        baseline: None."""
        value = self.state.value
        if value is None:
            return self.states.new_zeros(()), None
        assert isinstance(self.state.bridge, NoisingBridge)
        with torch.no_grad():
            pairs = zip(self.every, self.states.unbind(0))
            seen = torch.stack([self.state.bridge.denoised(k, x, self.y) for k, x in pairs])
        f = value.along(seen, self.run.chain.times[self.every], self.y)
        if others is None:
            return 0.5 * (f - weights).square().mean(), f.detach()
        softplus = torch.nn.functional.softplus
        return (weights * softplus(-f) + others * softplus(f)).mean(), f.detach().clamp(max=20.0).exp()

    def finish(self, total: Tensor) -> float:
        """Add the gradients, and remember the residuals of these steps (where none are known yet, their mean stands for
        those of the others); the loss, all steps alike."""
        state, rows = self.state, self.every
        (total / self.run.accumulate).backward(inputs=parameters_of(state))
        known = state.residuals.clone()
        if not bool(known.any()):
            known.fill_(float(self.means[rows].mean()))
            known[rows] = self.means[rows]
        known[rows] = known[rows].lerp(self.means[rows], 0.1)
        state.residuals.copy_(known)
        return float(self.means.sum()) * self.share


@full_precision()
def weighted_regression(
    state: ForwardState,
    run: Run,
    paths: Paths,
    part: int,
    steps: Sequence[int] | None,
    weights: Tensor,
    others: Tensor,
) -> dict[str, float]:
    """Add the gradients of one batch of ends: control, anchor and baseline.

    Args:
        weights: w towards Q_fine, ``(batch,)``, others: rho towards the reference, both of mean 1.

    Returns:
        "loss": that of the anchor's regression.
    """
    found = _Steps(state, run, paths, noised(state, run, paths, part, steps), steps)
    total, ratio = found.expected(weights, others)
    assert ratio is not None
    by_step = state.step_weights() * found.share
    for row, k, c, z, a in found:
        found.observe(k, z - a)
        loss = (others * found.square(z - a)).mean()
        if state.learns(run):
            gain = (weights - others * ratio[row]) * found.product(c, z - a.detach())
            loss = loss + (weights * found.square(c) - gain).mean()
        total = total + by_step[k] * loss
    return {"loss": found.finish(total)}


@full_precision()
def scored_regression(
    state: ForwardState,
    run: Run,
    paths: Paths,
    part: int,
    steps: Sequence[int] | None,
    coefficients: Tensor,
    path_cost: bool,
) -> dict[str, float]:
    """Add the gradients of one batch of ends of the current control: control, and, where there are, anchor and
    baseline (else the mean of the other ends is the baseline).

    Args:
        coefficients: zeta, ``(batch,)``, less the mean of the other ends. path_cost: less ``sum_{j >= k} |c_j|^2/2``
            along each noised path, estimated from the steps that are regressed on.

    Returns:
        "loss": that of the anchor's regression.
    """
    found = _Steps(state, run, paths, noised(state, run, paths, part, steps, joint=path_cost), steps)
    every = list(found)
    zeta = coefficients.expand(len(every), -1)
    if path_cost:
        costs = found.share * torch.stack([found.square(c.detach()) for _, _, c, _, _ in every])
        zeta = zeta - leave_one_out(costs.flip(0).cumsum(0).flip(0))
    total, level = found.expected(zeta, None)
    zeta = zeta if level is None else zeta - level
    anchored = state.anchor is not None
    by_step = (state.step_weights() if anchored else torch.ones_like(state.residuals)) * found.share
    for row, k, c, z, a in every:
        score = z - (a if anchored else c.detach())
        found.observe(k, score)
        loss = found.square(score).mean() if anchored else 0.0
        if state.learns(run):
            loss = loss + (found.square(c) - zeta[row] * found.product(c, score.detach())).mean()
        total = total + by_step[k] * loss
    return {"loss": found.finish(total)}
