"""``SoftPPO``: proximal policy optimisation of the entropy-regularised objective (tutorial Algorithm 1, [21])."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ranks
from ..chains.blocks import Block, blocks_for
from ..chains.shifts import gradient_blocks
from ..controls.values import learned_value
from ..errors import check_name
from ..paths.paths import Paths
from ..paths.weights import leave_one_out
from ..randomness import Place, derive_seed, generator_for
from ..tensors import check_count, check_positive
from .base import Method, Run, register
from .on_paths import collect, current_metrics, path_state, steps_of

BASELINES = ("batch", "per-time", "value")


@register
@dataclass(frozen=True)
class SoftPPO(Method):
    """Clipped surrogate of per-step ratios on paths of the current control, several epochs on each batch; black-box
    rewards.

    With ``ratio_k = p^u/p^old (x_{k+1}|x_k)`` and, in units of alpha, the cost still to come after step k's noise,
    ``G_k = -r/alpha + sum_{j>k} (h_j f_j/alpha + log p^old/p0 (x_{j+1}|x_j))``, less a baseline, ``A_k``, minimise::

        E sum_k [ max(A_k ratio_k, A_k clip(ratio_k, 1 - clip, 1 + clip)) + |c_k(x_k)|^2/2 ].

    At u = u_old its gradient is that of ``KL(P^u || Q_fine) = log Z - J/alpha``. Three departures from the print: costs
    want ``max``, not ``min``; the KL still to come is part of the cost (a step's own KL alone has no score-function
    gradient); and a step's own KL is differentiated directly. The KL to come is taken as its sampled log-ratio, of the
    same mean: then ``G_k`` is nearly ``-v_{k+1}(x_{k+1})/alpha``, without the noise of later steps, near the optimum.
    Log-probabilities are sums over dimensions.

    Args:
        clip: largest change of a step's ratio that is rewarded.
        epochs: passes over each batch.
        minibatches: parts of the paths, drawn anew in every epoch, with an optimiser step each.
        baseline: "batch": the mean of ``G_k`` over steps and the other paths; "per-time": over the other paths at step
            k; "value": a learned network of ``(x_k, t_k)`` (of earlier iterations, so that the gradient stays
            unbiased).
        group_size: GRPO (Shao et al. 2402.03300): so many paths share start and condition; baselines ("batch",
            "per-time") are means within the group, and a group's whole loss is divided by the standard deviation of its
            path costs. (Of the advantage alone it would change the temperature.) ``batch_size`` must be a multiple of
            it. None: no groups.
        steps: use so many randomly drawn steps of each path in every optimiser step (unbiased); None: all.
    """

    anneals: ClassVar[bool] = True
    splits: ClassVar[bool] = True
    clip: float = 0.2
    epochs: int = 4
    minibatches: int = 1
    baseline: str = "value"
    group_size: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        check_positive("clip", self.clip, below=1.0)
        check_count("epochs", self.epochs, 1)
        check_count("minibatches", self.minibatches, 1)
        check_count("group_size", self.group_size, 2, optional=True)
        check_count("steps", self.steps, 1, optional=True)
        check_name("baseline", self.baseline, BASELINES)
        if self.group_size is not None and self.baseline == "value":
            raise ValueError("group_size is for the baselines of a group; use baseline='per-time' or 'batch' with it.")

    def setup(self, run: Run) -> Any:
        if run.batch_size < 2 * self.minibatches:
            raise ValueError(
                f"batch_size must be at least 2 * minibatches={2 * self.minibatches}, got {run.batch_size}."
            )
        state = path_state(run, group_size=self.group_size)
        if self.baseline == "value":
            state.value = learned_value(run.problem, run.chain, derive_seed(run.seed, Place.PPO_VALUE))
        return state

    def step(self, state: Any, run: Run) -> dict[str, float]:
        batches = [self.advantages(state, run, collect(state, run, i, self.group_size)) for i in range(run.accumulate)]
        measured: dict[str, list[float]] = {"loss": [], "clip_fraction": [], "ratio_std": []}
        for epoch in range(self.epochs):
            orders = [self.order(run, epoch, part) for part in range(run.accumulate)]
            for turn in range(self.minibatches):
                state.zero_grad()
                for part, (batch, order) in enumerate(zip(batches, orders)):
                    place = (epoch * self.minibatches + turn) * run.accumulate + part
                    chosen, weight = _own(batch, order[turn]) if self.minibatches > 1 else (batch, 1.0)
                    loss, changes = self.learn(state, run, chosen, steps_of(run, self.steps, place), weight)
                    if self.baseline == "value" and epoch == 0:  # not in later ones: it costs as much as the control
                        self.learn_value(state, run, chosen, weight)
                    measured["loss"].append(loss)
                    measured["clip_fraction"].append(weight * float((changes.abs() > self.clip).float().mean()))
                    measured["ratio_std"].append(float(ranks.mean(weight * changes.square().mean()).sqrt()))
                run.descend(batches[0].paths)
        metrics = current_metrics(state, [b.paths for b in batches])
        return {**metrics, **{name: sum(v) / len(v) for name, v in measured.items()}}

    def order(self, run: Run, epoch: int, part: int) -> tuple[Tensor, ...]:
        generator = generator_for("cpu", run.seed, Place.PPO_ORDER, run.iteration, epoch, part)
        return torch.randperm(run.batch_size, generator=generator).to(run.problem.device).tensor_split(self.minibatches)

    def advantages(self, state: Any, run: Run, paths: Paths) -> _Batch:
        log_ratios = paths.log_ratio(per_step=True)
        steps = log_ratios - paths.log_target()
        # sums over the steps after each: what is still to come after its noise
        to_come = steps.flip(0).cumsum(0).flip(0) - steps - paths.reward / run.problem.alpha
        scale = torch.ones_like(paths.reward)
        if self.baseline == "value":
            with torch.no_grad():
                y = paths.condition
                advantages = to_come + state.value.along(paths.states[:-1], run.chain.times[:-1], y)
        elif self.baseline == "per-time":
            advantages = leave_one_out(to_come, self.group_size)
        else:  # the mean over steps is a number of each path, so that of the other paths depends on none of this one's
            own = to_come.mean(0)
            advantages = to_come - (own - leave_one_out(own, self.group_size))
        if self.group_size is not None:
            costs = -paths.log_weights().unflatten(0, (-1, self.group_size))
            scale = 1 / costs.std(1).clamp(min=1e-6).repeat_interleave(self.group_size)
        return _Batch(paths, log_ratios, to_come, advantages, scale)

    def learn(
        self, state: Any, run: Run, batch: _Batch, steps: list[int] | None, weight: float
    ) -> tuple[float, Tensor]:
        """Add the surrogate's gradient, ``weight`` times and block by block; the loss, and what the ratios differ from
        1 by."""
        paths, loss, changes = batch.paths, 0.0, []
        chosen = list(range(paths.steps)) if steps is None else steps
        for block in gradient_blocks(run.chain, state.control, paths.states[chosen], paths.condition, chosen):
            here = batch if block.rows == slice(0, len(paths)) else batch.rows(block.rows)
            part = chosen[block.steps]
            value, ratios = self.surrogate(state, here, None if len(part) == paths.steps else part)
            value = value * (weight * ratios.numel() / (len(chosen) * len(paths)))
            (value / run.accumulate).backward()
            loss += float(value.detach())
            changes.append((ratios - 1).flatten())
        return loss, torch.cat(changes)

    def learn_value(self, state: Any, run: Run, batch: _Batch, weight: float) -> None:
        """Add the gradient, ``weight`` times, of half the mean square of what the value is from the costs to come."""
        x, t, y = batch.paths.states[:-1], batch.paths.times[:-1], batch.paths.condition

        def value(block: Block) -> Tensor:
            return state.value.along(block.of(x), t[block.steps], None if y is None else y[block.rows])

        for block in blocks_for(state.value, x, value):
            squares = (value(block) + block.of(batch.to_come)).square().sum() / batch.to_come.numel()
            (0.5 * weight * squares / run.accumulate).backward()

    def surrogate(self, state: Any, batch: _Batch, steps: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """The loss, and the ratios ``(steps, batch)``."""
        every = slice(None) if steps is None else steps
        laws = batch.paths.under(state.control, steps)
        ratios = (laws.log_ratio - batch.log_ratios[every]).exp()
        A = batch.advantages[every]
        policy = torch.maximum(A * ratios, A * ratios.clamp(1 - self.clip, 1 + self.clip))
        part = len(batch.log_ratios) / len(ratios)
        loss = part * (batch.scale * (policy + laws.kl).sum(0)).mean()
        return loss, ratios.detach()


@dataclass(frozen=True)
class _Batch:
    """Paths of the old control: its log-ratios, costs to come and their advantages, ``(K, batch)``; scales
    ``(batch,)``."""

    paths: Paths
    log_ratios: Tensor
    to_come: Tensor
    advantages: Tensor
    scale: Tensor

    def rows(self, index: Tensor | slice) -> _Batch:
        return _Batch(
            self.paths.rows(index),
            self.log_ratios[:, index],
            self.to_come[:, index],
            self.advantages[:, index],
            self.scale[index],
        )


def _own(batch: _Batch, chosen: Tensor) -> tuple[_Batch, float]:
    """Those of the chosen paths of a whole batch that are among the own rows, and the weight with which the mean over
    them enters that over all of them."""
    rows = ranks.own_rows(len(batch.scale) * ranks.parts())
    some = chosen[(chosen >= rows.start) & (chosen < rows.stop)] - rows.start
    if not len(some):  # with no weight: gradients are exchanged all the same
        return batch.rows(slice(0, 1)), 0.0
    return batch.rows(some), len(some) * ranks.parts() / len(chosen)
