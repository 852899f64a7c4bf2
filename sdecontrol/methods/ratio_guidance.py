"""Guidance by a log density ratio: a regression on paths of the reference, then rounds on its own paths.

The first iteration fits values on the reference's paths (:func:`.ratio_fit.fit_values`); where their weights are too
uneven it fits a higher temperature, and the next ones go down on its own paths. Every further iteration is a round on
its own paths that corrects slopes (:func:`.ratio_fit.fit_slopes`). What a fit has done is measured on fresh paths,
which are those of the next round: a round that has made the guidance worse is halved once, then taken back, and is the
last. No parameter moves by the training loop's optimiser, and paths are functions of the seed and the iteration, so
that a run resumes from its parameters alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..controls.guidance import ValueControl
from ..controls.ratio_value import RatioValue
from ..errors import warn
from ..processes.modules import copied
from ..randomness import Place, derive_seed
from .base import ControlState, Run, path_metrics
from .ratio_fit import fit_values, value_rows, weighted_exponent
from .ratio_slopes import DECAYS, Moments, Slopes, fit_slopes, observed

_HIDDEN = (96, 96, 96)
#: of the regression on paths of the reference
STEPS = 600
_ROUND = 3  # a round on its own paths has so many times fewer of them
_LITTLE = 0.005  # nats that a round must promise
_CHANCE = 2.0  # standard errors by which a round may seem worse


class RatioState(ControlState):
    """The guidance, and what it was before the last round; the best round's objective so far (mean and error, in nats);
    the part of the reward that it is for, ``alpha/temperature``; moments of the rounds so far; how often paths were
    drawn; whether rounds still gain.

    Attributes:
        seen: what fresh paths of the guidance as it is say of it; drawn again after a resume.
    """

    beta: Tensor
    score: Tensor
    draws: Tensor
    ended: Tensor

    def __init__(self, control: ValueControl) -> None:
        super().__init__(control)
        self.kept = copied(control.value)
        size = self.value.slopes.numel()
        self.second = nn.Buffer(torch.zeros(size, size, dtype=torch.float64))
        self.first = nn.Buffer(torch.zeros(len(DECAYS), size, dtype=torch.float64))
        self.beta = nn.Buffer(torch.zeros((), dtype=torch.float64))
        self.score = nn.Buffer(torch.tensor([-math.inf, 0.0], dtype=torch.float64))
        self.draws = nn.Buffer(torch.zeros((), dtype=torch.int64))
        self.ended = nn.Buffer(torch.zeros((), dtype=torch.bool))
        self.seen: Slopes | None = None

    @property
    def guidance(self) -> ValueControl:
        assert isinstance(self.control, ValueControl)
        return self.control

    @property
    def value(self) -> RatioValue:
        value = self.control.value
        assert isinstance(value, RatioValue)
        return value

    def fresh(self) -> int:
        """The number of the next draw of paths."""
        number = int(self.draws)
        self.draws += 1
        return number


def ratio_state(run: Run) -> RatioState:
    """The value at its constant start.

    Warns where nothing of the reward can be seen but its number.
    """
    value = RatioValue.of(run.problem, run.chain, _HIDDEN, derive_seed(run.seed, Place.RATIO_VALUE))
    if value.unseen:
        warn(f"the value sees r(x0^) alone, since {value.unseen}; an nn.Module shows what it computes r from.")
    return RatioState(ValueControl(value, run.problem, run.chain))


def ratio_step(state: RatioState, run: Run, num_paths: int) -> dict[str, float]:
    """One iteration. Its metrics are of the guidance that it leaves, by paths drawn afterwards; on a ladder of
    temperatures, of the paths that were fitted to."""
    n = max(256, num_paths // _ROUND)
    with run.problem.evaluating():
        if float(state.beta) == 1:
            return _improve(state, run, n)
        found = _lower(state, run, n if float(state.beta) else num_paths)
        if float(state.beta) < 1:
            return found
        state.seen = observed(run, state.guidance, n, state.fresh())
        state.score.copy_(torch.tensor(state.seen.objective()))
        return {**found, **path_metrics(state.seen.paths)}


def _lower(state: RatioState, run: Run, n: int) -> dict[str, float]:
    """Fit values on paths of the reference, or of the guidance at a higher temperature, at the lowest temperature that
    their weights allow."""
    past = float(state.beta)
    control, value = state.control if past else None, state.value
    rows, whole, shown = value_rows(run, value, control, n, state.fresh())
    beta = weighted_exponent(run, whole, n, past)
    value.level.copy_((beta * whole[0] - whole[1]).double().logsumexp(0) - math.log(whole.shape[1]))
    loss = fit_values(run, value, rows, beta, STEPS)[1]
    state.beta.fill_(beta)
    return {**path_metrics(shown), "loss": loss, "temperature": run.problem.alpha / beta}


def _improve(state: RatioState, run: Run, n: int) -> dict[str, float]:
    """A round on the guidance's own paths, unless it would gain little; halved once, then taken back, where fresh paths
    say that it has made the guidance worse."""
    value = state.value
    seen = state.seen or observed(run, state.guidance, n, int(state.draws) - 1)
    state.kept.load_state_dict(value.state_dict())
    past = Moments(state.second, state.first) if bool(state.first.any()) else None
    gain, found = fit_slopes(value, seen, past, _LITTLE)
    state.second.copy_(found.second)
    state.first.copy_(found.first)
    part = 1.0 if gain else 0.0
    while part:
        fresh = observed(run, state.guidance, n, state.fresh())
        if not _worse(fresh.objective(), state.score.tolist()):
            seen = fresh
            break
        part = 0.5 if part == 1 else 0.0
        with torch.no_grad():
            for now, before in zip(value.parameters(), state.kept.parameters()):
                now.lerp_(before, 0.5 if part else 1.0)
    mean, error = seen.objective()
    if mean > float(state.score[0]):
        state.score.copy_(torch.tensor([mean, error]))
    state.seen = seen
    state.ended.fill_(part == 0)
    return {**path_metrics(seen.paths), "loss": -gain, "temperature": run.problem.alpha, "kept": part}


def _worse(new: Sequence[float], best: Sequence[float]) -> bool:
    """Whether an objective (mean and error) is below another one by more than chance."""
    return new[0] < best[0] - _CHANCE * math.hypot(new[1], best[1])
