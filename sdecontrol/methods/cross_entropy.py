"""``CrossEntropy``: importance-weighted maximum likelihood on whole paths (Zhang et al. 2014, SIAM J. Control Optim.
52)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..paths.paths import Paths
from ..paths.weights import self_normalised, tempered
from ..tensors import check_count
from .base import Run, register
from .on_paths import PathMethod, add_scores, moved, regression_loss, steps_of


@register
@dataclass(frozen=True)
class CrossEntropy(PathMethod):
    """Minimise the forward ``KL(Q_fine || P^u)``: likelihood of paths of a control v, weighted by
    ``w = exp(R/alpha) dQ0/dP^v``. No gradient of the reward.

    The weights are normalised in log space over the batch (or group). With paths of the current control the mean score,
    whose expectation is zero, is subtracted: the gradient is then noiseless where the weights are equal, at the
    optimum (on stored paths it is weighted by ``dP^u/dP^v``: noiseless at a rung's target). On the chain the minimiser
    is the mean shift of the soft-optimal kernel, O(h) from the best mean-shift control (equal to it for
    linear-quadratic problems).

    Args:
        paths: "current", "reference", or a control or solution whose paths to learn from.
        trust_region: largest ``KL(weighted || unweighted paths)`` in nats: the weights are tempered to it, so that
            every iteration heads for a point between the current law and Q_fine; with ``replay`` the steps of one rung
            head for the same one (:class:`~sdecontrol.methods.ladder.Ladder`). With other paths than the current ones
            the tempered target is also what is learned, since those paths never get closer. None: whole weights.
        replay: keep so many batches and learn from random parts of them; 0: from each batch once.
        group_size: normalise the weights among so many paths that share start and condition; None: in the whole batch.
        steps: take the gradient through so many randomly drawn steps of each path (unbiased); None: all.
    """

    tempers: ClassVar[bool] = True
    zero_weights: ClassVar[bool] = True
    reference_steps: ClassVar[bool] = False
    paths: Any = "current"
    trust_region: float | None = None
    group_size: int | None = None
    steps: int | None = None
    replay: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("group_size", self.group_size, 2, optional=True)
        check_count("steps", self.steps, 1, optional=True)

    def learn(self, state: Any, run: Run, part: int, paths: Paths) -> dict[str, float]:
        steps = steps_of(run, self.steps, part)
        laws = paths.under(state.control, steps, drew=state.own_paths)
        if state.replay is None:
            weights, exponent, ess = self_normalised(paths.log_weights(), self.group_size, self.trust_region)
        else:
            exponent = state.exponent
            weights, _, ess = self_normalised(tempered(paths.log_weights(), exponent), self.group_size)
        # the mean score under P^u is 0: on its own paths, and on others where they are weighted by dP^u/dP^v
        own = torch.zeros_like(weights)
        if state.behaviour is None:
            stored = state.replay is not None
            own = self_normalised(moved(state.control, laws).sum(0), self.group_size).weights if stored else own + 1
        add_scores(run, laws.log_ratio, own - weights)
        return {"loss": regression_loss(paths, laws.log_ratio, weights, steps), "ess": ess, "exponent": exponent}
