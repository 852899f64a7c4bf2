"""Rewards that were learned from measurements: an ensemble of regressors, its mean and its spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..precision import call
from ..processes.finite import check_tokens
from ..shapes import PerPath, Samples
from ..tensors import as_float, check_count


@dataclass(frozen=True)
class Calibration:
    """How an ensemble did on data that no member has seen.

    Attributes:
        rows: how many. rmse: of the mean, in the reward's units. r2: share of the variance that the mean explains.
        scale: the root mean square of error over the members' standard deviation, which is too small by so much there;
            spreads are so many standard deviations. Away from the data nothing says that it holds.
        within_one, within_two: share of errors within one and two spreads; of Gaussian errors 0.683 and 0.954.
        order: rank correlation of spread and absolute error: whether it is wrong where it is unsure.
    """

    rows: int
    rmse: float
    r2: float
    scale: float
    within_one: float
    within_two: float
    order: float

    def __str__(self) -> str:
        return (
            f"on {self.rows} held-out rows: rmse {self.rmse:.3g}, R2 {self.r2:.3f}; a spread is {self.scale:.2g} "
            f"standard deviations of the members: {self.within_one:.0%} of errors within one, {self.within_two:.0%} "
            f"within two, rank correlation with errors {self.order:.2f}"
        )


class LearnedReward(nn.Module):
    """``mean_m f_m(x) + beta spread(x)`` of an ensemble, ``(batch,)``: the mean as :func:`fit_reward` returns it, a
    lower or an upper bound as ``pessimistic`` and ``optimistic`` do (tutorial, section 7.3: where data are given and no
    more are to be had, and where they are asked for).

    The spread is the standard deviation between members, times ``calibration.scale`` where that is known.

    Attributes:
        members: the regressors, of standardised rewards. centre, unit: by which these are made rewards again.
        beta: what is added, in spreads. calibration: on held-out data; None without them.
        vocabulary: of tokens, which a member sees one-hot; None: x are numbers. With tokens it takes their
            probabilities, too, so that it has a gradient by them, as :class:`OneHot` has.
    """

    centre: Tensor
    unit: Tensor

    def __init__(
        self,
        members: Sequence[nn.Module],
        centre: float,
        unit: float,
        calibration: Calibration | None = None,
        vocabulary: int | None = None,
        beta: float = 0.0,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        like = next(self.members.parameters())
        self.register_buffer("centre", torch.as_tensor(centre, dtype=like.dtype, device=like.device))
        self.register_buffer("unit", torch.as_tensor(unit, dtype=like.dtype, device=like.device))
        self.calibration, self.vocabulary, self.beta = calibration, vocabulary, float(beta)

    @property
    def takes_probabilities(self) -> bool:
        return self.vocabulary is not None

    def each(self, x: Samples) -> Tensor:
        """What every member says, ``(members, batch)``."""
        if self.vocabulary is not None and not x.is_floating_point():
            check_tokens("x", x, self.vocabulary)
            x = nn.functional.one_hot(x, self.vocabulary).to(self.centre.dtype)
        return self.centre + self.unit * torch.stack([call(member, x) for member in self.members])

    def forward(self, x: Samples) -> PerPath:
        values = self.each(x)
        mean = values.mean(0)
        return mean if self.beta == 0 else mean + self.beta * self._spread(values)

    def spread(self, x: Samples) -> PerPath:
        """How unsure the mean is, ``(batch,)``, in the reward's units."""
        return self._spread(self.each(x))

    def _spread(self, values: Tensor) -> Tensor:
        """With a gradient that is finite where members agree."""
        if len(values) < 2:
            return 0 * values[0]
        variance = (values - values.mean(0)).square().sum(0) / (len(values) - 1)
        scale = 1.0 if self.calibration is None else self.calibration.scale
        return scale * (variance + (1e-6 * self.unit) ** 2).sqrt()

    def _with(self, beta: float) -> LearnedReward:
        return LearnedReward(
            list(self.members), float(self.centre), float(self.unit), self.calibration, self.vocabulary, beta
        )

    def pessimistic(self, beta: float = 1.0) -> LearnedReward:
        """The mean less beta spreads: for data that are all there will be (Figure 4 of the tutorial)."""
        return self._with(-as_float("beta", beta, positive=True))

    def optimistic(self, beta: float = 1.0) -> LearnedReward:
        """The mean and beta spreads: what next to measure (Figure 5 of the tutorial)."""
        return self._with(as_float("beta", beta, positive=True))

    def member(self, index: int) -> LearnedReward:
        """One member alone, such as a Thompson draw; its spread is 0."""
        check_count("index", index, 0)
        if index >= len(self.members):
            raise ValueError(f"index must be below {len(self.members)}, the number of members, got {index}.")
        one: Any = [self.members[index]]
        return LearnedReward(one, float(self.centre), float(self.unit), self.calibration, self.vocabulary)

    def extra_repr(self) -> str:
        known = self.calibration or "no rows were held out, by which the spread could be judged"
        return f"{len(self.members)} members, beta={self.beta:g}; {known}"

    def __repr__(self) -> str:
        return f"LearnedReward({self.extra_repr()})"
