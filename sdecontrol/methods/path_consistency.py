"""``PathConsistency``: squared residuals of the soft Bellman equation along paths (tutorial Algorithm 5, [33]-[35])."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..controls.values import LearnedLogZ, learned_value
from ..paths.paths import Paths
from ..randomness import Place, derive_seed
from ..tensors import check_count
from .base import Run, also_named, register
from .on_paths import PathMethod, add_scores, moved, starts_differ


@register
@dataclass(frozen=True)
class PathConsistency(PathMethod):
    """Minimise ``E sum_j D_j^2/2`` for the n-step residuals, ``v_K = r``, on stored paths; no gradient of the reward::

        D_j = (v_j(x_j) - v_{j+n}(x_{j+n}))/alpha + sum_{j <= k < j+n} [ log p^u/p0 (x_{k+1}|x_k) + h_k f_k/alpha ].

    In the words of GFlowNets, and by these names: "trajectory-balance" is n = "all" (Malkin et al. 2201.13259),
    "sub-trajectory-balance" n = 10 steps (Madan et al. 2209.12782, with windows of one length), "detailed-balance"
    n = 1; flows are ``exp(v/alpha)``.

    Algorithm 5 is n = 1 ([34]): value and control have gradients of their own, each with the other's
    part constant, and ``v_{j+n}`` is detached. n-step: windows cut at the end; the losses of
    the windows that a step is in are averaged. "all": ``(Y + log Z)^2/2`` with a learned log Z (which [35] omits),
    the moment form of :class:`LogVariance`. With paths of the current control the expected gradient
    is zero at the best mean-shift control and its value; with others the minimiser moves by O(h) (docs/mathematics.md
    section 3).

    Args:
        n: 1, a number of steps, or "all".
        paths: "current", "reference", or a control or solution whose paths to learn from.
        replay: keep so many batches and learn from random parts of them, of a batch's size (off-policy); 0: from
            each batch once.
        trust_region: go up a ladder of targets, each at most so many nats from the law at its foot
            (:class:`~sdecontrol.methods.ladder.Ladder`): the residuals are then ``beta D_j``, plus ``(1 - beta) log
            p^u/p^{u_i}`` of the window's steps, on the stored paths of u_i, which ``beta v`` and ``beta log Z`` absorb
            the norms of. It replaces annealing, and needs ``replay``. None: straight for Q_fine.
    """

    annealing: ClassVar[bool] = True

    n: int | str = "all"
    paths: Any = "current"
    replay: int = 0
    trust_region: float | None = None

    def __post_init__(self) -> None:
        if self.n != "all":
            if isinstance(self.n, str):
                raise ValueError(f"n must be 'all' or a number of steps >= 1, got {self.n!r}.")
            check_count("n", self.n, 1)
        super().__post_init__()

    @property
    def reference_steps(self) -> bool:  # type: ignore[override]
        """Windows have values at their ends."""
        return self.n != "all"

    @property
    def fixed_target(self) -> bool:  # type: ignore[override]
        return self.n != "all"

    def setup(self, run: Run) -> Any:
        state = super().setup(run)
        seed = derive_seed(run.seed, Place.CONSISTENCY_VALUE)
        if self.n == "all":
            state.log_z = LearnedLogZ(run.problem, run.chain, starts_differ(run.problem), seed)
        else:
            state.value = learned_value(run.problem, run.chain, seed)
        return state

    def learn(self, state: Any, run: Run, part: int, paths: Paths) -> dict[str, float]:
        laws = paths.under(state.control, drew=state.own_paths)
        log_ratios = laws.less_reverse(laws.log_ratio)
        # the part of the residual that the target of a ladder has of Q_fine, and that of the law that drew the paths
        beta = state.exponent
        deltas = log_ratios.detach() - paths.log_target()
        if beta < 1:
            deltas = beta * deltas + (1 - beta) * moved(state.control, laws)
        end = beta * paths.reward / run.problem.alpha
        if self.n == "all":
            value = beta * state.log_z(paths.states[0], paths.condition).unsqueeze(0)
            residuals = value.detach() + deltas.sum(0) - end
            coefficients, count = residuals, 1
            state.log_z.follow(residuals / beta)
        else:
            value = beta * state.value.along(paths.states[:-1], run.chain.times[:-1], paths.condition)
            K, device = len(deltas), deltas.device
            count = min(int(self.n), K)
            # D_j; the windows that begin less than n steps before the end are cut there
            sums = torch.cat((torch.zeros_like(deltas[:1]), deltas.cumsum(0)))
            last = (torch.arange(K, device=device) + count).clamp(max=K)
            values = torch.cat((value.detach(), end.unsqueeze(0)))
            residuals = values[:-1] - values[last] + sums[last] - sums[:-1]
            # a step's score meets the residuals of all windows it is in
            sums = torch.cat((torch.zeros_like(residuals[:1]), residuals.cumsum(0)))
            top = torch.arange(1, K + 1, device=device)
            coefficients = (sums[top] - sums[(top - count).clamp(min=0)]) / count
        if value.requires_grad:
            ((residuals * value).sum(0).mean() / count / run.accumulate).backward()
        add_scores(run, log_ratios, coefficients)
        metrics = {"loss": 0.5 * float(residuals.square().sum(0).mean()) / count}
        if self.n == "all":
            metrics["learned_log_z"] = float(state.log_z(paths.states[0], paths.condition).detach().mean())
        return metrics


also_named(
    trajectory_balance=PathConsistency,
    sub_trajectory_balance=lambda: PathConsistency(n=10),
    detailed_balance=lambda: PathConsistency(n=1),
)
