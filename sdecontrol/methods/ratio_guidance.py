"""Guidance by a log density ratio: a regression on paths of the reference, then rounds on its own paths.

The first iteration fits values on the reference's paths (:func:`.ratio_fit.fit_values`); where their weights are too
uneven it fits a higher temperature, and the next ones go down on its own paths. Every further iteration is a round on
its own paths that corrects slopes (:func:`.ratio_fit.fit_slopes`). No parameter moves by the training loop's optimiser,
and paths are functions of the seed and the iteration, so that a run resumes from its parameters alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..controls.guidance import ValueControl
from ..controls.ratio_value import RatioValue
from ..errors import warn
from ..processes.modules import copied
from ..randomness import Place, derive_seed
from .base import ControlState, Run, path_metrics
from .ratio_fit import DECAYS, Moments, fit_slopes, fit_values, observed, value_rows, weighted_exponent

_HIDDEN = (96, 96, 96)
#: of the regression on paths of the reference
STEPS = 600
_ROUND = 3  # a round on its own paths has so many times fewer of them
_LITTLE = 0.005  # nats that a round must gain for another one


class RatioState(ControlState):
    """The guidance; the best value so far and its objective (mean and error, in nats); the part of the reward that it
    is for, ``alpha/temperature``; moments of the rounds so far; whether rounds still gain."""

    beta: Tensor
    score: Tensor
    ended: Tensor

    def __init__(self, control: ValueControl) -> None:
        super().__init__(control)
        self.kept = copied(control.value)
        size = self.value.slopes.numel()
        self.second = nn.Buffer(torch.zeros(size, size, dtype=torch.float64))
        self.first = nn.Buffer(torch.zeros(len(DECAYS), size, dtype=torch.float64))
        self.beta = nn.Buffer(torch.zeros((), dtype=torch.float64))
        self.score = nn.Buffer(torch.full((2,), math.nan, dtype=torch.float64))
        self.ended = nn.Buffer(torch.zeros((), dtype=torch.bool))

    @property
    def guidance(self) -> ValueControl:
        assert isinstance(self.control, ValueControl)
        return self.control

    @property
    def value(self) -> RatioValue:
        value = self.control.value
        assert isinstance(value, RatioValue)
        return value


def ratio_state(run: Run) -> RatioState:
    """The value at its constant start.

    Warns where nothing of the reward can be seen but its number.
    """
    value = RatioValue.of(run.problem, run.chain, _HIDDEN, derive_seed(run.seed, Place.RATIO_VALUE))
    if value.unseen:
        warn(f"the value sees r(x0^) alone, since {value.unseen}; an nn.Module shows what it computes r from.")
    return RatioState(ValueControl(value, run.problem, run.chain))


def ratio_step(state: RatioState, run: Run, num_paths: int) -> dict[str, float]:
    """One iteration."""
    with run.problem.evaluating():
        if float(state.beta) < 1:
            return _lower(state, run, num_paths)
        return _improve(state, run, num_paths)


def _lower(state: RatioState, run: Run, num_paths: int) -> dict[str, float]:
    """Fit values on paths of the reference, or of the guidance at a higher temperature, at the lowest temperature that
    their weights allow."""
    past = float(state.beta)
    control, value = state.control if past else None, state.value
    n = max(256, num_paths // _ROUND) if past else num_paths
    rows, whole, shown = value_rows(run, value, control, n)
    beta = weighted_exponent(run, whole, n, past)
    value.level.copy_((beta * whole[0] - whole[1]).double().logsumexp(0) - math.log(whole.shape[1]))
    loss = fit_values(run, value, rows, beta, STEPS)[1]
    state.beta.fill_(beta)
    return {**path_metrics(shown), "loss": loss, "temperature": run.problem.alpha / beta}


def _improve(state: RatioState, run: Run, num_paths: int) -> dict[str, float]:
    """A round on the guidance's own paths, unless the last one has made it worse: then that is taken back."""
    value = state.value
    slopes = observed(run, state.guidance, max(256, num_paths // _ROUND))
    shown = path_metrics(slopes.paths)
    objective = torch.cat([(p.reward - p.cost) / p.alpha - p.kl() for p in slopes.paths]).double()
    mean, error = float(objective.mean()), float(objective.std()) / math.sqrt(len(objective))
    best, its_error = state.score.tolist()
    if mean < best - 3 * math.hypot(error, its_error):
        value.load_state_dict(state.kept.state_dict())
        state.ended.fill_(True)
        return {**shown, "loss": math.nan, "temperature": run.problem.alpha}
    state.kept.load_state_dict(value.state_dict())
    state.score.copy_(torch.tensor([mean, error]))
    past = Moments(state.second, state.first) if bool(state.first.any()) else None
    gain, found = fit_slopes(value, slopes, past)
    state.second.copy_(found.second)
    state.first.copy_(found.first)
    state.ended.fill_(gain < _LITTLE)
    return {**shown, "loss": -gain, "temperature": run.problem.alpha}
