"""``BridgeMatching``: regression on the reference's bridges to ends of the model, weighted or scored by their reward
([42]-[45], tutorial Section 9)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..chains.shifts import shift_function, shifts_along
from ..errors import check_name
from ..paths.paths import Paths
from ..paths.weights import leave_one_out, self_normalised
from ..problems.problem import ControlProblem
from ..tensors import check_count, event_sum
from .base import Run, also_named, register
from .forward_process import ForwardState, noised, scored_regression, weighted_regression
from .on_paths import PathMethod, path_state, steps_of

TARGETS = ("weighted", "reinforce")


@register
@dataclass(frozen=True)
class BridgeMatching(PathMethod):
    """Clean ends of a model, states between drawn anew from the reference's bridge (of a generative reference: noised
    anew), and a regression of the control on ``z_k = E[xi_k | x_k, x_K]``. No gradient of the reward.

    Ends come from paths of a control v.

    * ``target="weighted"``: they have importance weights ``w = exp(r/alpha) dQ0/dP^v`` towards Q_fine, and
      ``u = E[w z | x]/E[w | x]``, the minimiser of the forward ``KL(Q_fine || P^u)``: for a generative reference
      reward-weighted denoising. It is :class:`CrossEntropy` with the noise of the middle averaged out. Fixed point:
      Q_fine, so its end has the law ``p_r``.
    * ``target="reinforce"``: reinforce adjoint matching (Bergmeister et al. 2605.10759),
      ``u_k = Cov_u(r/alpha - sum_{j >= k} |c_j|^2/2, z_k | x_k)`` on the tuned model's own ends, with the path cost
      that its Section 5 retains. Fixed point: the same.
    * ``target="reinforce", path_cost=False``: its simple form, ``u = Cov_u(r/alpha, z | x)``. Its fixed point is
      ``p_r`` for a linear reward and Gaussian data only: for data N(0, 1) and ``r/alpha = -q x^2/2`` its variance V
      solves ``V exp(q V) = 1`` (q = 1: .567; ``p_r`` has .5). On fresh ends it has the gradient, up to a factor, of
      DiffusionNFT (2509.16117) with KL weight ``2 alpha beta``, beta its mixing of old and new prediction, and of
      advantage-weighted matching (2509.25050) with KL weight alpha; DiffusionNFT without a KL term has none (it drifts
      to the largest reward).
    * ``normalise=True``: rewards are divided by their standard deviation in the batch, as group-relative advantages
      are. The fixed point is then that of temperature ``alpha std(r)``, std under the tuned model: another law.

    For a pre-trained model the regression is anchored (``methods/forward_process.py``): by a second control of its
    class, and a baseline, that are trained along; equal rewards then leave exactly the pre-trained model. Where the
    bridge is exact (a linear reference), or the score (a mixture in the model's place), nothing is anchored. The
    noising is the bridge in continuous time: the fixed point is O(h) from the chain's optimum.

    Needs no running cost, and a reference whose bridges are known: a linear one; or a memoryless ``generative_sde`` at
    its own noise level, or ``diffusion_chain`` with eta = 1.

    Args:
        paths: "current", "reference", or a control or solution whose ends to learn from.
        trust_region: largest ``KL(weighted || unweighted ends)`` in nats, by tempering, as in :class:`CrossEntropy`;
            None: whole weights.
        target, path_cost, normalise: see above.
        anchor: False: plain regression on a pre-trained model too, which pays for the difference between it and the
            true denoiser of its samples.
        steps: regress on so many randomly drawn steps of each batch (unbiased); None: all.
    """

    paths: Any = "current"
    trust_region: float | None = None
    target: str = "weighted"
    path_cost: bool = True
    normalise: bool = False
    anchor: bool = True
    steps: int | None = None

    tempers: ClassVar[bool] = True
    gaussian: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("target", self.target, TARGETS)
        check_count("steps", self.steps, 1, optional=True)
        plain = self.target == "weighted"
        if plain and (self.normalise or not self.path_cost):
            raise ValueError("path_cost and normalise are for target='reinforce'; weights need the whole reward.")
        if not plain and self.trust_region is not None:
            raise ValueError("trust_region tempers weights; target='reinforce' has none.")
        if not plain and self.paths != "current":
            raise ValueError("target='reinforce' is an expectation under the current control: use paths='current'.")

    def check(self, problem: ControlProblem) -> None:
        super().check(problem)
        if problem.running_cost_function is not None:
            raise ValueError(
                "bridge-matching: with a running cost the bridges of the target are not the reference's. Use "
                "cross-entropy, which regresses on whole paths."
            )

    def setup(self, run: Run) -> Any:
        known = path_state(run, self.paths)
        anchored = self.anchor and run.problem.reference.mixture is None
        return ForwardState(run, known.control, known.behaviour, anchored)

    def learn(self, state: ForwardState, run: Run, part: int, paths: Paths) -> dict[str, float]:
        weights, exponent, ess = self_normalised(paths.log_weights(), None, self.trust_region)
        found = {"ess": ess, "exponent": exponent}
        steps = steps_of(run, self.steps, part)
        if self.target == "reinforce":
            zeta = self.scores(paths)
            return {**scored_regression(state, run, paths, part, steps, zeta, self.path_cost), **found}
        if state.anchor is not None:
            others = self_normalised(-paths.log_ratio()).weights
            return {**weighted_regression(state, run, paths, part, steps, weights, others), **found}
        states = noised(state, run, paths, part, steps)
        target = state.bridge.noise_given_end(states, paths.end, paths.condition, steps)
        if steps is None:
            c = shifts_along(run.chain, state.control, states, paths.condition)
        else:
            shift = shift_function(run.chain, state.control)
            c = torch.stack([shift(k, x, paths.condition) for k, x in zip(steps, states)])
        squares = event_sum(0.5 * (c - target) ** 2, len(run.chain.noise_shape)).sum(0)
        loss = (weights * squares).mean() * (run.chain.steps / len(states))
        (loss / run.accumulate).backward()
        return {"loss": float(loss.detach()), **found}

    def scores(self, paths: Paths) -> Tensor:
        """``r/alpha`` ``(batch,)``, less the mean of the others (exactly 0 where all are equal)."""
        value = (paths.reward - paths.reward[:1]) / paths.alpha
        if self.normalise:
            value = value / paths.reward.std().clamp(min=1e-6)
        return leave_one_out(value)


also_named(
    reward_weighted_denoising=BridgeMatching,
    reinforce_adjoint_matching=lambda: BridgeMatching(target="reinforce"),
    diffusion_nft=lambda: BridgeMatching(target="reinforce", path_cost=False),
    advantage_weighted_matching=lambda: BridgeMatching(target="reinforce", path_cost=False, normalise=True),
)
