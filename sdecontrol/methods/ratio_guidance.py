"""Guidance by a log density ratio: a regression on paths of the reference, then rounds on its own paths.

The first iteration fits values on the reference's paths (:func:`.ratio_fit.fit_values`); where their weights are too
uneven it fits a higher temperature, and the next ones go down on its own paths. Every further iteration is a round on
its own paths (:class:`.ratio_rounds.RatioRounds`) that corrects slopes (:func:`.ratio_slopes.fit_slopes`). No parameter
moves by the training loop's optimiser.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from ..controls.guidance import ValueControl
from ..controls.ratio_value import RatioValue
from ..errors import warn
from ..randomness import Place, derive_seed
from .base import Run, path_metrics
from .ratio_fit import fit_values, value_rows, weighted_exponent
from .ratio_rounds import LITTLE, ROUND, RatioRounds
from .ratio_slopes import DECAYS, Moments, Slopes, fit_slopes, observed

_HIDDEN = (96, 96, 96)
#: of the regression on paths of the reference
STEPS = 600


class RatioState(RatioRounds[Slopes]):
    """The state of rounds, and the moments of those so far."""

    def __init__(self, control: ValueControl) -> None:
        super().__init__(control)
        size = self.value.slopes.numel()
        self.second = nn.Buffer(torch.zeros(size, size, dtype=torch.float64))
        self.first_moments = nn.Buffer(torch.zeros(len(DECAYS), size, dtype=torch.float64))

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
    """One iteration. Its metrics are of the guidance that it leaves, by paths drawn afterwards; on a ladder of
    temperatures, of the paths that were fitted to."""
    n = max(256, num_paths // ROUND)
    with run.problem.evaluating():
        if float(state.beta) == 1:
            return _improve(state, run, n)
        found = _lower(state, run, n if float(state.beta) else num_paths)
        if float(state.beta) < 1:
            return found
        seen = state.first(lambda number: observed(run, state.guidance, n, number))
        return {**found, **path_metrics(seen.paths)}


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
    """A round on the guidance's own paths, unless it would gain little."""

    def look(number: int) -> Slopes:
        return observed(run, state.guidance, n, number)

    before = state.begin(look)
    past = Moments(state.second, state.first_moments) if bool(state.first_moments.any()) else None
    gain, found = fit_slopes(state.value, before, past, LITTLE)
    state.second.copy_(found.second)
    state.first_moments.copy_(found.first)
    part = state.settle(before, look, 1.0 if gain else 0.0)
    assert state.seen is not None
    return {**path_metrics(state.seen.paths), "loss": -gain, "temperature": run.problem.alpha, "kept": part}
