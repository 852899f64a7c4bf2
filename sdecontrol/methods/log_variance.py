"""``LogVariance``: the variance of the log importance weight, and its moment form (Nüsken & Richter 2005.05409)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..controls.values import LearnedLogZ
from ..errors import check_name
from ..paths.weights import leave_one_out, self_normalised
from ..randomness import Place, derive_seed
from ..tensors import check_count
from .base import Run, register
from .on_paths import PathMethod, add_scores, collect, current_metrics, path_state, starts_differ, steps_of

LOSSES = ("variance", "moment")
_GROUP = 8


@register
@dataclass(frozen=True)
class LogVariance(PathMethod):
    """Minimise ``Var_{P^v}[Y(u)]/2`` with ``Y(u) = log dP^u/dQ0 - R/alpha`` on stored paths of a control v; no gradient
    of the reward.

    ``Y`` is the negative log importance weight: constant at the soft-optimal law. With paths of the current control (v
    = u, detached) the gradient of the loss is that of ``KL(P^u || Q_fine)``, and zero at the best mean-shift control;
    it is the score-function gradient with the likelihood ratio as a control variate, so that its noise nearly vanishes
    at the optimum. With other paths the minimiser moves by O(h) (docs/mathematics.md section 3). "moment" is
    ``E (Y + log Z)^2/2`` with a learned log Z: the same gradient in expectation, also known as trajectory balance.

    For annealed Langevin (CMCD-LV) the control has a part in the backward kernels B of the target too. ``Y`` has both,
    and is constant at the optimum alone, but away from it the gradient on the control's own paths,
    ``E[(Y - EY) d(log P - log B)]``, is no longer that of the KL, ``E[(Y - EY) d log P] - E[d log B]``.

    Args:
        loss: "variance" or "moment".
        paths: "current", "reference", or a control or solution whose paths to learn from.
        steps: take the gradient through so many randomly drawn steps of each path (unbiased: it is a sum over steps
            with a constant coefficient); None: all.
        group_size: paths per start and condition, for the conditional variance ``E Var[Y | X_0]``: with a random start
            that keeps its law, or conditions, Y is constant given these only. None: 8 there ("moment" learns log Z as
            their function instead), else the whole batch. ``batch_size`` must be a multiple of it.
    """

    anneals: ClassVar[bool] = True
    reference_steps: ClassVar[bool] = False
    fixed_target: ClassVar[bool] = False
    loss: str = "variance"
    paths: Any = "current"
    steps: int | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        check_name("loss", self.loss, LOSSES)
        super().__post_init__()
        check_count("steps", self.steps, 1, optional=True)
        check_count("group_size", self.group_size, 2, optional=True)

    def _group(self, run: Run) -> int | None:
        needed = self.group_size is None and self.loss == "variance" and starts_differ(run.problem)
        return _GROUP if needed else self.group_size

    def setup(self, run: Run) -> Any:
        state = path_state(run, self.paths, self._group(run))
        if self.loss == "moment":
            place = derive_seed(run.seed, Place.LOG_VARIANCE_LOG_Z)
            state.log_z = LearnedLogZ(run.problem, run.chain, starts_differ(run.problem), place)
        return state

    def step(self, state: Any, run: Run) -> dict[str, float]:
        parts, group = [], self._group(run)
        metrics = {"loss": 0.0, "ess": 0.0} if state.behaviour is None else {"loss": 0.0}
        for part in range(run.accumulate):
            paths = collect(state, run, part, group)
            laws = paths.under(state.control, steps_of(run, self.steps, part))
            log_ratios = laws.less_reverse(laws.log_ratio)
            with torch.no_grad():
                y = -paths.log_weights(None if state.behaviour is None else state.control)
            if self.loss == "variance":
                coefficients = leave_one_out(y, group)
                value = 0.5 * float((y * coefficients).mean())
            else:
                log_z = state.log_z(paths.states[0], paths.condition)
                coefficients = y + log_z.detach()
                value = 0.5 * float(coefficients.square().mean())
                metrics["learned_log_z"] = float(log_z.detach().mean())
                if log_z.requires_grad:
                    ((coefficients * log_z).mean() / run.accumulate).backward()
                state.log_z.follow(coefficients)
            add_scores(run, log_ratios, coefficients)
            metrics["loss"] += value / run.accumulate
            if state.behaviour is None:
                metrics["ess"] += self_normalised(-y, group).ess / run.accumulate
            parts.append(paths)
        run.descend()
        return {**current_metrics(state, parts), **metrics}
