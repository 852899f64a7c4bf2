"""``BridgeMatching``: regression on the reference's bridges to reward-weighted ends ([42]-[45], tutorial Section 9)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..chains.bridges import bridge_of
from ..chains.shifts import shifts_along
from ..paths.paths import Paths
from ..paths.weights import self_normalised
from ..problems.problem import ControlProblem
from ..randomness import Place, generator_for
from .base import Run, register
from .on_paths import PathMethod


@register
@dataclass(frozen=True)
class BridgeMatching(PathMethod):
    """Forward ``KL(Q_fine || P^u)`` on pairs of ends: regress the control on the drift of the reference conditioned on
    its end.

    Both ends come from simulated paths, weighted to Q_fine by ``w = exp(r/alpha) dQ0/dP^v`` (normalised in log space);
    between them states are drawn anew from the reference's bridge, since the bridges of Q_fine are the reference's
    where there is no running cost (Theorem 3), and the target is ``E[xi_k | x_k, x_K]``. It is :class:`CrossEntropy`
    with the noise of the middle averaged out: the same expected gradient on the chain. A baseline for control problems:
    the target's variance given x_k does not vanish at the optimum.

    Needs a reference whose bridges are known and no running cost: a linear one, or a memoryless generative one, whose
    bridge is the noising process (in continuous time: the fixed point is O(h) from the chain's optimum); or masked
    diffusion, where it masks the end again: reward-weighted denoising cross-entropy.

    Args:
        paths: "current", "reference", or a control or solution whose ends to learn from.
        trust_region: largest ``KL(weighted || unweighted ends)`` in nats, by tempering, as in :class:`CrossEntropy`;
            None: whole weights.
    """

    paths: Any = "current"
    trust_region: float | None = None

    tempers: ClassVar[bool] = True
    gaussian: ClassVar[bool] = True
    masked_tokens: ClassVar[bool] = True

    def check(self, problem: ControlProblem) -> None:
        super().check(problem)
        if problem.running_cost_function is not None:
            raise ValueError(
                "bridge-matching: with a running cost the bridges of the target are not the reference's. Use "
                "cross-entropy, which regresses on whole paths."
            )

    def setup(self, run: Run) -> Any:
        state = super().setup(run)
        state.bridge = bridge_of(run.chain, run.problem.start)
        return state

    def learn(self, state: Any, run: Run, part: int, paths: Paths) -> dict[str, float]:
        weights, exponent, ess = self_normalised(paths.log_weights(), None, self.trust_region)
        start, end = paths.states[0], paths.end
        generator = generator_for(end.device, run.seed, Place.BRIDGES, run.iteration, part)
        like = run.chain.times
        noise = torch.randn(paths.states[1:].shape, generator=generator, dtype=like.dtype, device=like.device)
        states = state.bridge.between(start, end, noise)
        c = shifts_along(run.chain, state.control, states, paths.condition)
        loss = (weights * state.bridge.misfit(c, states, end, paths.condition).sum(0)).mean()
        (loss / run.accumulate).backward()
        return {"loss": float(loss.detach()), "ess": ess, "exponent": exponent}
