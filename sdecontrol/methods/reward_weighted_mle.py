"""``RewardWeightedMLE``: reward-weighted regression on the reference's own steps (tutorial Algorithm 3, [24], [26])."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..errors import check_name
from ..paths.weights import self_normalised, warn_where_few
from ..randomness import Place, generator_for
from .base import METRICS, Run, register
from .on_paths import PathMethod, collect, regression_loss

ROLL_INS = ("current", "none")


@register
@dataclass(frozen=True)
class RewardWeightedMLE(PathMethod):
    """Regress the control on the noise of reference steps, weighted by ``exp(R/alpha)``; no gradient of the reward.

    Tutorial Algorithm 3: follow the current control up to a random step k (the same for all paths of an iteration),
    then the reference, and minimise ``sum_{j >= k} w |c_j(x_j) - xi_j|^2/2`` with ``w = exp(R_k/alpha)``, R_k the total
    reward from step k on, normalised in log space over the batch. Given x_j the weighted mean of ``xi_j`` is the mean
    shift of the soft-optimal kernel, so the fixed point is that, whatever the roll-in: the gradient is a sum over x_k
    of forward KLs of the rest of the path, weighted by ``exp(v_k(x_k)/alpha)``. Printed is the loss at step k alone;
    the later steps of the same path are as good.

    ``|c - xi|^2/2`` is [24]'s ``|x_{k+1} - rho_u(x_k)|^2`` in the norm of the step's covariance (with the factor 1/2
    that the print lacks), and for a diffusion model, whose tuned prediction makes the shift, [26]'s noise prediction:
    one regression in three notations.

    Args:
        roll_in: "current", as above; "none", the off-policy form: whole paths of the reference. Its gradient is that of
            ``KL(Q_fine || P^u)``, but its weights are as poor as the reference is far from the target.
    """

    roll_in: str = "current"

    residual: ClassVar[bool] = True
    zero_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_name("roll_in", self.roll_in, ROLL_INS)

    def first_step(self, run: Run, part: int) -> int:
        """The first step of the reference."""
        if self.roll_in == "none":
            return 0
        generator = generator_for("cpu", run.seed, Place.ROLL_IN, run.iteration, part)
        return int(torch.randint(run.chain.steps, (), generator=generator))

    def step(self, state: Any, run: Run) -> dict[str, float]:
        chain = run.chain
        loss, ess, paths = 0.0, 0.0, None
        for part in range(run.accumulate):
            first = self.first_step(run, part)
            paths = collect(state, run, part, until=first)
            rest = list(range(first, chain.steps))
            log_ratios = paths.under(state.control, rest if first else None).log_ratio
            weights = self_normalised(paths.reward / run.problem.alpha + paths.log_target()[first:].sum(0))
            # -log p^u is -log p0, which is constant, less the log-ratio
            (-(weights.weights * log_ratios.sum(0)).mean() / run.accumulate).backward()
            loss += regression_loss(paths, log_ratios, weights.weights, rest) / run.accumulate
            ess += weights.ess / run.accumulate
        if run.iteration % 100 == 0:
            remedy = "Use a larger batch or alpha, or a method on paths of the current control (cross-entropy)."
            warn_where_few(self.name, ess, run.batch_size, remedy)
        run.descend(paths)
        return {**dict.fromkeys(METRICS, math.nan), "loss": loss, "ess": ess}
