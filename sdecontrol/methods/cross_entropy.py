"""``CrossEntropy``: importance-weighted maximum likelihood on whole paths (Zhang et al. 2014, SIAM J. Control Optim.
52)."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..paths.paths import Paths
from ..paths.weights import self_normalised
from ..tensors import check_count, check_positive
from .base import Run, register
from .on_paths import PathMethod, add_scores, regression_loss, steps_of


@register
@dataclass(frozen=True)
class CrossEntropy(PathMethod):
    """Minimise the forward ``KL(Q_fine || P^u)``: likelihood of paths of a control v, weighted by
    ``w = exp(R/alpha) dQ0/dP^v``. No gradient of the reward.

    The weights are normalised in log space over the batch (or group). With paths of the current control the mean score,
    whose expectation is zero, is subtracted: the gradient is then noiseless where the weights are equal, at the
    optimum. On the chain the minimiser is the mean shift of the soft-optimal kernel, O(h) from the best mean-shift
    control (equal to it for linear-quadratic problems).

    Args:
        paths: "current", "reference", or a control or solution whose paths to learn from.
        trust_region: largest ``KL(weighted || unweighted paths)`` in nats: the weights are tempered to it, so that
            every iteration heads for a point between the current law and Q_fine. With other paths than the current ones
            the tempered target is also what is learned, since those paths never get closer. None: whole weights.
        group_size: normalise the weights among so many paths that share start and condition; None: in the whole batch.
        steps: take the gradient through so many randomly drawn steps of each path (unbiased); None: all.
    """

    reference_steps: ClassVar[bool] = False
    paths: Any = "current"
    trust_region: float | None = None
    group_size: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("trust_region", self.trust_region, optional=True)
        check_count("group_size", self.group_size, 2, optional=True)
        check_count("steps", self.steps, 1, optional=True)

    def learn(self, state: Any, run: Run, part: int, paths: Paths) -> dict[str, float]:
        weights, exponent, ess = self_normalised(paths.log_weights(), self.group_size, self.trust_region)
        steps = steps_of(run, self.steps, part)
        log_ratios = paths.under(state.control, steps, drew=state.behaviour is None).log_ratio
        add_scores(run, log_ratios, 1 - weights if state.behaviour is None else -weights)
        return {"loss": regression_loss(paths, log_ratios, weights, steps), "ess": ess, "exponent": exponent}
