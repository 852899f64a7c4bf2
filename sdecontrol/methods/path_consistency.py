"""``PathConsistency``: squared residuals of the soft Bellman equation along paths (tutorial Algorithm 5, [33]-[35])."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..controls.values import LearnedLogZ, learned_value
from ..paths.paths import Paths
from ..paths.replay import ReplayBuffer
from ..randomness import Place, derive_seed, generator_for
from ..tensors import check_count
from .base import Run, also_named, register
from .on_paths import PathMethod, add_scores, collect, current_metrics, starts_differ


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
        replay: keep the last so many batches and learn from a random part of all of them, of a batch's size
            (off-policy); 0: from each batch once.
    """

    anneals: ClassVar[bool] = True

    n: int | str = "all"
    paths: Any = "current"
    replay: int = 0

    def __post_init__(self) -> None:
        if self.n != "all":
            if isinstance(self.n, str):
                raise ValueError(f"n must be 'all' or a number of steps >= 1, got {self.n!r}.")
            check_count("n", self.n, 1)
        super().__post_init__()
        check_count("replay", self.replay, 0)

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
        if self.replay:
            y = run.problem.draw_condition(1, 0)
            costs = run.problem.running_cost_function is not None
            state.replay = ReplayBuffer(run.chain, self.replay * run.batch_size, y, costs)
        return state

    def step(self, state: Any, run: Run) -> dict[str, float]:
        parts, loss = [], 0.0
        for part in range(run.accumulate):
            paths = collect(state, run, part)
            parts.append(paths)
            if self.replay:
                state.replay.add(paths)
                generator = generator_for("cpu", run.seed, Place.REPLAY, run.iteration, part)
                paths = state.replay.draw(run.batch_size, generator, run.problem)
            loss += self._learn(state, run, paths) / run.accumulate
        run.descend()
        metrics = {**current_metrics(state, parts), "loss": loss}
        if self.n == "all":
            metrics["learned_log_z"] = float(state.log_z(paths.states[0], paths.condition).detach().mean())
        return metrics

    def _learn(self, state: Any, run: Run, paths: Paths) -> float:
        """Add the gradients; the loss."""
        laws = paths.under(state.control, drew=state.behaviour is None and not self.replay)
        log_ratios = laws.less_reverse(laws.log_ratio)
        deltas = log_ratios.detach() - paths.log_target()
        end = paths.reward / run.problem.alpha
        if self.n == "all":
            value = state.log_z(paths.states[0], paths.condition).unsqueeze(0)
            residuals = value.detach() + deltas.sum(0) - end
            coefficients, count = residuals, 1
            state.log_z.follow(residuals)
        else:
            value = state.value.along(paths.states[:-1], run.chain.times[:-1], paths.condition)
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
        return 0.5 * float(residuals.square().sum(0).mean()) / count


also_named(
    trajectory_balance=PathConsistency,
    sub_trajectory_balance=lambda: PathConsistency(n=10),
    detailed_balance=lambda: PathConsistency(n=1),
)
