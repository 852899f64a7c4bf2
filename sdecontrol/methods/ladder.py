"""Stored paths that are learned from several times, and the ladder of targets between the current law and Q_fine that
a trust region makes of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..paths.paths import Paths
from ..paths.replay import ReplayBuffer
from ..paths.weights import largest_exponent
from ..randomness import Place, generator_for
from .base import Run

PASSES = 4  # times that a rung learns from each of its paths, on average


class Ladder(ReplayBuffer):
    """The last ``replay`` batches of paths; with a trust region those of one control u_i, the foot of a rung.

    Without a trust region every iteration adds its batch. With one, and while Q_fine is farther than it from the
    current law, ``replay`` batches of the current control u_i are drawn at once, and the next iterations learn from
    random parts of them towards ``Q_{i+1} ~ (P^{u_i})^{1-beta} Q_fine^beta``, beta <= 1 the largest whose KL from
    ``P^{u_i}``, by the tempered weights of all these paths, is at most ``trust_region``. A rung is over when its paths
    were learned from four times on average; the next begins where the control then is. Where a batch has Q_fine within
    the trust region, it is learned from once, on-policy.

    The fixed points are those of the plain loss on paths of the current control, at every step size: at ``u = u_i`` the
    gradient is beta times its own (of cross-entropy: that of its tempered weights).

    Args:
        group_size: consecutive paths of one start or condition: weights are compared within these; None: all.
    """

    def __init__(self, run: Run, replay: int, trust_region: float | None, group_size: int | None = None) -> None:
        y, costs = run.problem.draw_condition(1, 0), run.problem.running_cost_function is not None
        self.batches = replay if trust_region is None else max(replay, run.accumulate)
        super().__init__(run.chain, self.batches * run.batch_size, y, costs)
        self.trust_region, self.group_size = trust_region, group_size
        self.exponent: Tensor
        self.left: Tensor
        if trust_region is not None:
            self.register_buffer("exponent", torch.ones((), dtype=torch.float64))
            self.register_buffer("left", torch.zeros((), dtype=torch.long))

    @property
    def asks(self) -> bool:
        """Whether this iteration needs paths of the current control."""
        return self.trust_region is None or int(self.left) <= 0

    def far(self, paths: Sequence[Paths]) -> bool:
        """Whether Q_fine is beyond the trust region of these paths; of all of them together is their exponent."""
        if self.trust_region is None:
            return False
        log_w = torch.cat([p.log_weights() for p in paths])
        self.exponent.fill_(largest_exponent(log_w, self.group_size, self.trust_region))
        return float(self.exponent) < 1

    def begin(self, paths: Sequence[Paths]) -> None:
        """A new rung, of these paths."""
        self.far(paths)
        for p in paths:
            self.add(p)
        self.left.fill_(PASSES * len(paths))

    def again(self, run: Run, part: int) -> Paths:
        """A batch of the stored paths, drawn anew for every part of every iteration."""
        if self.trust_region is not None:
            self.left -= 1
        generator = generator_for("cpu", run.seed, Place.REPLAY, run.iteration, part)
        return self.draw(run.batch_size, generator, run.problem, self.group_size or 1)
