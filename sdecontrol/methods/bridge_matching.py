"""``BridgeMatching``: regression on the reference's bridges to ends of the model, weighted or scored by their reward
([42]-[45], tutorial Section 9)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ranks
from ..chains.bridges import bridge_of
from ..chains.shifts import shifts_along
from ..errors import check_name
from ..paths.paths import Paths
from ..paths.weights import self_normalised
from ..problems.problem import ControlProblem
from ..problems.slope import reward_slope
from ..randomness import Place, generator_for
from ..tensors import check_count
from .base import Run, also_named, register
from .forward_process import (
    Ends,
    ForwardState,
    Noised,
    anchored_target,
    expected_reward,
    regress_both,
    scored_target,
    unexpected,
)
from .on_paths import PathMethod, path_state, steps_of

TARGETS = ("weighted", "reinforce", "adjoint")


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
      ``u_k = Cov_u(r/alpha, z_k | x_k) - sum_{j > k} Cov_u(|c_j|^2/2, E[xi_k | x_k, x_j] | x_k)`` on the tuned model's
      own ends, with the path cost that its Section 5 retains. Fixed point: the same. Of the reward what the data that
      the model expects, ``r(x0^)``, tell of it is taken away first (an anchored regression; a black box is not asked):
      no mean changes, and the noise is less by much (docs/fine_tuning.md).
    * ``target="reinforce", path_cost=False``: its simple form, ``u = Cov_u(r/alpha, z | x)``. Its fixed point is
      ``p_r`` for a linear reward and Gaussian data only: for data N(0, 1) and ``r/alpha = -x^2/2`` the variance is
      .546 (as published, with the control for ``E[z | x]`` and among linear controls, .540; ``p_r`` has .5). On fresh
      ends it has the gradient, up to a factor, of DiffusionNFT (2509.16117) with KL weight ``2 alpha beta``, beta its
      mixing of old and new prediction, and of advantage-weighted matching (2509.25050) with KL weight alpha;
      DiffusionNFT without a KL term has no fixed point (it drifts to the largest reward).
    * ``normalise=True``: rewards are divided by their standard deviation in the batch, as group-relative advantages
      are. The fixed point is then that of temperature ``alpha std(r)``, std under the tuned model: another law.
    * ``target="adjoint"``: efficient adjoint matching (2605.11480), which takes the gradient of the reward: relative to
      the linear reference whose end is ``N(0, I)`` the model's law is a tilt of it, so that the lean adjoint is a
      multiple of ``grad (r/alpha + log(p0_T/N))`` at clean ends of the tuned model. Fixed point: ``p_r`` where the
      model's score at clean ends is exact; a network is asked for it at the level of the last step.

    For a pre-trained model the regression is anchored (``methods/forward_process.py``): by a second control of its
    class that is trained along; but for ``target="adjoint"``, equal rewards then leave exactly the pre-trained model.
    Where the bridge is exact (a linear reference), or the score (a mixture in the model's place), nothing is anchored.
    The noising is the bridge in continuous time: the fixed point is O(h) from the chain's optimum. Of a model that is
    not the denoiser of its own samples the weighted form's law is only approximately ``p_r``.

    Needs no running cost, and a reference whose bridges are known: a linear one; a memoryless ``generative_sde`` at its
    own noise level, or ``diffusion_chain`` with eta = 1; or masked diffusion, where it masks the end again. Linear
    references and tokens (reward-weighted denoising cross-entropy) have the weighted target alone, and no anchor.

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
    masked_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("target", self.target, TARGETS)
        scored = self.target == "reinforce"
        check_count("steps", self.steps, 2 if scored and self.path_cost else 1, optional=True)
        if not scored and (self.normalise or not self.path_cost):
            raise ValueError("path_cost and normalise are for target='reinforce'; the others need the whole reward.")
        if self.target != "weighted" and self.trust_region is not None:
            raise ValueError(f"trust_region tempers weights; target={self.target!r} has none.")
        if self.target != "weighted" and self.paths != "current":
            raise ValueError(
                f"target={self.target!r} is an expectation under the current control: use paths='current'."
            )

    @property
    def needs_gradient(self) -> bool:  # type: ignore[override]
        return self.target == "adjoint"

    def check(self, problem: ControlProblem) -> None:
        super().check(problem)
        if problem.stop is not None:
            raise ValueError(
                "bridge-matching: the bridges of a process that stops are not the reference's. Use cross-entropy or "
                "particle-matching, which regress on whole paths."
            )
        if problem.running_cost_function is not None:
            raise ValueError(
                "bridge-matching: with a running cost the bridges of the target are not the reference's. Use "
                "cross-entropy, which regresses on whole paths."
            )
        if self.target != "weighted" and not (problem.reference.reversal and problem.start == "memoryless"):
            raise ValueError(
                f"bridge-matching: target={self.target!r} noises ends anew: it needs a memoryless generative_sde at "
                "its own noise level, or a diffusion_chain with eta=1. Linear references and tokens have "
                "target='weighted' alone."
            )

    def setup(self, run: Run) -> Any:
        known = path_state(run, self.paths)
        state = ForwardState(run, known.control, bridge_of(run.chain, run.problem.start), self.anchor)
        state.behaviour = known.behaviour
        return state

    def learn(self, state: ForwardState, run: Run, part: int, paths: Paths) -> dict[str, float]:
        weights, exponent, ess = self_normalised(paths.log_weights(), None, self.trust_region)
        steps = steps_of(run, self.steps, part)
        generator = generator_for(paths.end.device, run.seed, Place.BRIDGES, run.iteration, part)
        if self.target == "weighted" and state.anchor is None:
            loss = self._plain(state, run, paths, weights, generator, steps)
        else:
            ends, joint = Ends(paths.states[0], paths.end, paths.condition), self.target == "reinforce"
            noised = Noised(state, run, ends, generator, steps, joint and self.path_cost)
            if self.target == "weighted":
                log_rho = -paths.log_ratio()
                ratio = exponent * paths.log_weights() - log_rho
                targets = anchored_target(noised.z, noised.a.detach(), ratio)
                loss = regress_both(state, run, noised, targets, weights, self_normalised(log_rho).weights)
            elif self.target == "reinforce":
                loss = self._reinforce(state, run, paths, noised)
            else:
                loss = self._adjoint(state, run, paths, noised)
        return {"loss": loss, "ess": ess, "exponent": exponent}

    def _plain(
        self, state: ForwardState, run: Run, paths: Paths, weights: Tensor, generator: torch.Generator, steps: Any
    ) -> float:
        """Whatever the bridge is; tokens, too."""
        chain, y, bridge = run.chain, paths.condition, state.bridge
        assert bridge is not None
        count = chain.steps if steps is None else len(steps)
        noise = ranks.own_normals((count, *paths.end.shape), 1, generator, chain.times)
        states = bridge.between(paths.states[0], paths.end, noise, steps)
        c = shifts_along(chain, state.control, states, y, steps=steps)
        loss = (weights * bridge.misfit(c, states, paths.end, y, steps).sum(0)).mean() * (chain.steps / count)
        (loss / run.accumulate).backward()
        return float(loss.detach())

    def _reinforce(self, state: ForwardState, run: Run, paths: Paths, noised: Noised) -> float:
        c = noised.shifts(state.control)
        cost = noised.half_square(c.detach()) if self.path_cost else None
        a = c if state.anchor is None else noised.a
        # with the control in the anchor's place, as published, z - a has another mean than 0 on the way
        seen = None if state.anchor is None else expected_reward(run, noised)
        zeta = unexpected(self.scores(paths), seen)
        targets = scored_target(noised, zeta, a.detach(), cost)
        even = torch.ones_like(paths.reward)
        return regress_both(state, run, noised, targets, even, even, c)

    def _adjoint(self, state: ForwardState, run: Run, paths: Paths, noised: Noised) -> float:
        bridge, steps = noised.bridge, noised.given
        of_model = bridge.end_score(paths.end, noised.y) + paths.end
        noised.z = bridge.noise_given_slope(noised.states, of_model, noised.y, steps)
        of_reward = bridge.noise_of_slope(reward_slope(run.problem, paths)[1], steps)
        targets = noised.z - noised.a.detach() + of_reward
        untuned = self_normalised(-paths.log_ratio()).weights
        return regress_both(state, run, noised, targets, torch.ones_like(untuned), untuned)

    def scores(self, paths: Paths) -> Tensor:
        """``r/alpha`` ``(batch,)``, less the first (exactly 0 where all are equal)."""
        rewards = ranks.whole(paths.reward)
        value = (paths.reward - rewards[:1]) / paths.alpha
        if self.normalise:
            value = value / rewards.std().clamp(min=1e-6)
        return value


also_named(
    reward_weighted_denoising=BridgeMatching,
    reinforce_adjoint_matching=lambda: BridgeMatching(target="reinforce"),
    efficient_adjoint_matching=lambda: BridgeMatching(target="adjoint"),
    diffusion_nft=lambda: BridgeMatching(target="reinforce", path_cost=False),
    advantage_weighted_matching=lambda: BridgeMatching(target="reinforce", path_cost=False, normalise=True),
)
