"""``Reinforce``: the plain score-function gradient, a yardstick (Williams 1992)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..errors import check_name
from ..paths.paths import Paths
from ..paths.weights import leave_one_out
from ..tensors import check_count
from .base import Run, register
from .on_paths import PathMethod, add_scores, steps_of

BASELINES = ("none", "batch")


@register
@dataclass(frozen=True)
class Reinforce(PathMethod):
    """The gradient of ``KL(P^u || Q_fine)`` as ``E[(C - b) sum_k xi_k . dc_k + sum_k c_k . dc_k]`` with the whole
    path's cost ``C = -R/alpha + sum_k |c_k|^2/2``, on paths of the current control; the reward may be a black box.

    It multiplies every step's score by the cost of all steps, so its noise does not vanish at the optimum: a yardstick.
    ``SoftPPO`` uses the cost still to come, ``LogVariance`` the likelihood ratio in the place of the KL; all have the
    same expected gradient.

    Args:
        baseline: b: "batch", the mean cost of the other paths; "none".
        steps: use so many randomly drawn steps of every path's sum (unbiased); None: all.
    """

    annealing: ClassVar[bool] = True
    reference_steps: ClassVar[bool] = False
    fixed_target: ClassVar[bool] = False
    baseline: str = "batch"
    steps: int | None = None

    def __post_init__(self) -> None:
        check_name("baseline", self.baseline, BASELINES)
        check_count("steps", self.steps, 1, optional=True)

    def learn(self, state: Any, run: Run, part: int, paths: Paths) -> dict[str, float]:
        cost = paths.kl() - (paths.reward - paths.cost) / run.problem.alpha
        laws = paths.under(state.control, steps_of(run, self.steps, part), drew=True)
        advantage = leave_one_out(cost) if self.baseline == "batch" else cost
        add_scores(run, advantage * laws.log_ratio + laws.less_reverse(laws.kl), torch.ones_like(advantage))
        return {"loss": float(cost.mean())}
