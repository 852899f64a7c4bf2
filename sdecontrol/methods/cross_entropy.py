"""``CrossEntropy``: importance-weighted maximum likelihood on whole paths (Zhang et al. 2014, SIAM J. Control Optim. 52)."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..paths.weights import self_normalised, warn_where_few
from ..tensors import check_count, check_positive
from .base import Run, register
from .on_paths import PathMethod, add_scores, collect, current_metrics, path_state, regression_loss, steps_of


@register
@dataclass(frozen=True)
class CrossEntropy(PathMethod):
    """Minimise the forward ``KL(Q_fine || P^u)``: likelihood of paths of a control v, weighted by
    ``w = exp(R/alpha) dQ0/dP^v``. No gradient of the reward.

    The weights are normalised in log space over the batch (or group). With paths of the current control the mean score, whose
    expectation is zero, is subtracted: the gradient is then noiseless where the weights are equal, at the optimum. On the chain the
    minimiser is the mean shift of the soft-optimal kernel, O(h) from the best mean-shift control (equal to it for linear-quadratic
    problems).

    Args:
        paths: "current", "reference", or a control or solution whose paths to learn from.
        trust_region: largest ``KL(weighted || unweighted paths)`` in nats: the weights are tempered to it, so that every
            iteration heads for a point between the current law and Q_fine. With other paths than the current ones the tempered target
            is also what is learned, since those paths never get closer. None: whole weights.
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

    def setup(self, run: Run) -> Any:
        return path_state(run, self.paths, self.group_size)

    def step(self, state: Any, run: Run) -> dict[str, float]:
        parts, found = [], []
        loss = 0.0
        for part in range(run.accumulate):
            paths = collect(state, run, part, self.group_size)
            weights = self_normalised(paths.log_weights(), self.group_size, self.trust_region)
            log_ratios = paths.under(state.control, steps := steps_of(run, self.steps, part)).log_ratio
            w = weights.weights
            add_scores(run, log_ratios, 1 - w if state.behaviour is None else -w)
            loss += regression_loss(paths, log_ratios, w, steps) / run.accumulate
            parts.append(paths)
            found.append(weights)
        ess = sum(f.ess for f in found) / len(found)
        if run.iteration % 100 == 0:
            size = self.group_size or run.batch_size
            warn_where_few(self.name, ess, size, "Use trust_region=1.0, a larger batch or alpha, or better paths.")
        run.descend()
        exponent = sum(f.exponent for f in found) / len(found)
        return {**current_metrics(state, parts), "loss": loss, "ess": ess, "exponent": exponent}
