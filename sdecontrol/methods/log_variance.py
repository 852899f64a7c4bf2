"""``LogVariance``: the variance of the log importance weight (Nüsken & Richter 2005.05409)."""

from dataclasses import InitVar, dataclass
from typing import Any, ClassVar

import torch

from ..paths.paths import Paths
from ..paths.weights import leave_one_out, self_normalised
from ..tensors import check_count
from .base import Run, register
from .on_paths import PathMethod, add_scores, moved, starts_differ, steps_of

_GROUP = 8


@register
@dataclass(frozen=True)
class LogVariance(PathMethod):
    """Minimise ``Var_{P^v}[Y(u)]/2`` with ``Y(u) = log dP^u/dQ0 - R/alpha`` on stored paths of a control v; no gradient
    of the reward.

    ``Y`` is the negative log importance weight: constant at the soft-optimal law. With paths of the current control (v
    = u, detached) the gradient of the loss is that of ``KL(P^u || Q_fine)``, and zero at the best mean-shift control;
    it is the score-function gradient with the likelihood ratio as a control variate, so that its noise nearly vanishes
    at the optimum. With other paths the minimiser moves by O(h) (docs/mathematics.md section 3). The moment
    form ``E (Y + log Z)^2/2`` with a learned log Z, trajectory balance, is ``PathConsistency(n="all")``.

    For annealed Langevin (CMCD-LV) the control has a part in the backward kernels B of the target too. ``Y`` has both,
    and is constant at the optimum alone, but away from it the gradient on the control's own paths,
    ``E[(Y - EY) d(log P - log B)]``, is no longer that of the KL, ``E[(Y - EY) d log P] - E[d log B]``.

    Args:
        loss: "variance", nothing else.
        paths: "current", "reference", or a control or solution whose paths to learn from.
        steps: take the gradient through so many randomly drawn steps of each path (unbiased: it is a sum over steps
            with a constant coefficient); None: all.
        group_size: paths per start and condition, for the conditional variance ``E Var[Y | X_0]``: with a random start
            that keeps its law, or conditions, Y is constant given these only. None: 8 there, else the whole
            batch. ``batch_size`` must be a multiple of it.
    """

    annealing: ClassVar[bool] = True
    reference_steps: ClassVar[bool] = False
    fixed_target: ClassVar[bool] = False
    loss: InitVar[str] = "variance"
    paths: Any = "current"
    steps: int | None = None
    group_size: int | None = None
    trust_region: float | None = None
    replay: int = 0

    def __post_init__(self, loss: str) -> None:
        if loss != "variance":
            raise ValueError(
                f"loss={loss!r}: log-variance has the variance alone; the moment loss, with a learned log Z, is "
                "PathConsistency(n='all'), by name 'trajectory-balance'."
            )
        super().__post_init__()
        check_count("steps", self.steps, 1, optional=True)
        check_count("group_size", self.group_size, 2, optional=True)

    def group(self, run: Run) -> int | None:
        needed = self.group_size is None and starts_differ(run.problem)
        return _GROUP if needed else self.group_size

    def learn(self, state: Any, run: Run, part: int, paths: Paths) -> dict[str, float]:
        group, steps = self.group(run), steps_of(run, self.steps, part)
        laws = paths.under(state.control, steps, drew=state.own_paths)
        log_ratios = laws.less_reverse(laws.log_ratio)
        log_w = paths.log_weights()
        if state.replay is not None:
            y = moved(state.control, laws).sum(0) - state.exponent * log_w
        else:
            with torch.no_grad():
                y = -log_w if state.behaviour is None else -paths.log_weights(state.control)
        coefficients = leave_one_out(y, group)
        add_scores(run, log_ratios, coefficients)
        metrics = {"loss": 0.5 * float((y * coefficients).mean())}
        if state.behaviour is None:
            metrics["ess"] = self_normalised(log_w, group).ess
        return metrics
