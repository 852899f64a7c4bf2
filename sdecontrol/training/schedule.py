"""The factor on the learning rate, and when there is no more to gain: a decision about the last half of a run."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_LOOKS = 1.1  # one look at the run to the next
_BLOCKS = 8  # in a quarter of a run: iterations next to one another are not independent
_SURE = 2.681  # standard errors: 99 %, one-sided, of Student's t with the 12 degrees of freedom of :class:`Gain`
_NOISE = 2.0  # standard errors below which a loss that is no residual of nats has not fallen


class Score(NamedTuple):
    """What an iteration says of how far a run has come: means over its paths, that rise.

    Attributes:
        objective: objective / alpha, in nats. elbo: the mean log-weight, which has the same expectation. residual: -log
            of a residual that is 0 at the optimum. spread: standard deviation of the paths' log-weights, in nats. nan:
            not known.
    """

    objective: float
    elbo: float = math.nan
    residual: float = math.nan
    spread: float = math.nan


class Gain(NamedTuple):
    """By how much the second half of some scores lies above the first, with its standard error.

    Each half is averaged in eight blocks. What these differ from a straight line of their half is the noise: so neither
    what neighbouring iterations share nor a steady gain counts as less or more of it. For blocks of independent normal
    noise about two lines, ``(value - truth) / stderr`` is Student's t with 2 (8 - 2) degrees of freedom.
    """

    value: float
    stderr: float

    @classmethod
    def of(cls, scores: Tensor) -> "Gain":
        """Of ``(n,)`` scores, n >= 16; what is left over by blocks of equal size is the oldest of each half."""
        half = len(scores) // 2
        size = half // _BLOCKS
        blocks = torch.stack([scores[-2 * half : -half], scores[-half:]])[:, half % _BLOCKS :]
        blocks = blocks.unflatten(1, (_BLOCKS, size)).mean(2)
        time = torch.arange(_BLOCKS, dtype=scores.dtype) - (_BLOCKS - 1) / 2
        slopes = blocks @ time / time.square().sum()
        means = blocks.mean(1)
        noise = (blocks - means[:, None] - slopes[:, None] * time).square().sum(1) / (_BLOCKS - 2)
        return cls(float(means[1] - means[0]), math.sqrt(float(noise.sum()) / _BLOCKS))

    @property
    def at_most(self) -> float:
        """What the gain is below with 99 % confidence. A loss by chance says nothing of gains to come."""
        return max(0.0, self.value) + _SURE * self.stderr


class LearningRateSchedule:
    """The factor on the learning rate, and when to stop.

    With a fixed number of iterations: a short warm-up, a constant rate, a cosine decay to 0.

    Without one the constant rate ends, and a decay half as long as what has passed begins, which averages what is left
    of the noise away, once another step of work is not worth it, or 70 % of the most iterations allowed have passed. A
    step of work is a quarter of the run so far, or ``step`` iterations where that is more. What it gains is seen from
    what the last one gained: by how much the mean of the fourth quarter of the scores lies above that of the third
    (extrapolated linearly where quarters are shorter than ``step``). Not worth it is a gain that is, with 99 %
    confidence at each look,

    * below ``worth`` nats, or below ``part`` of the standard deviation of the paths' log-weights where that is more
      (normal log-weights of that deviation s leave a gap of s^2/2, so this is a twentieth of the gap or less);
    * and, where the method has a residual, less than a half of that.

    Of a gap c/n after n iterations the quarters differ by 0.47 c/n, about what twice as many iterations gain (0.5 c/n);
    of progress that does not slow down at all, by a quarter of it. Looks are a tenth of the run apart, from ``least``
    iterations: false ends late in a run are as rare as its last few independent looks are few. No such rule sees what
    has not begun to show: a mode that no path has reached is no gain.

    A method that measures itself what it gains, in nats, such as on particles drawn anew, is taken at its word: the
    decay begins where a step of work would change less than ``worth`` by the last ones, with the same confidence.

    Losses that are no nats (of paths other than the control's own) have a floor that nobody knows: there the decay
    begins where the last ``step`` iterations are not better than the ``step`` before by two standard errors.

    Args:
        iterations: exactly, or at most where ``adaptive``.
        same_paths: consecutive iterations whose scores may be of the same paths: the first look waits until every block
            of :class:`Gain` has as many.
        measured: whether the method says itself what it gains.
    """

    step = 100
    least = 100
    worth = 0.1
    part = 0.05

    def __init__(self, iterations: int, adaptive: bool, same_paths: int = 1, measured: bool = False) -> None:
        self.iterations, self.adaptive, self.measured = iterations, adaptive, measured
        self.measured_at = 0  # iterations before the method last said so
        self.decay_from: int | None = None if adaptive else int(0.25 * iterations)
        self.last = iterations
        self.next_look = max(self.least, 4 * _BLOCKS * same_paths)

    def factor(self, i: int, elapsed: float = 0.0) -> float:
        """Factor at iteration i; ``elapsed`` is the part of a time budget that is spent."""
        warm = min(1.0, (i + 1) / max(1.0, min(50.0, 0.05 * self.iterations)))
        part = elapsed
        if self.decay_from is not None and i >= self.decay_from:
            part = max(part, (i - self.decay_from + 1) / max(1, self.last - self.decay_from))
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, part)))

    def observe(self, i: int, scores: Sequence[Score], gain: Gain | None = None) -> None:
        """Look at the scores so far, those at the problem's own temperature, after iteration i; start the decay where
        there is no more to gain.

        Args:
            gain: of the iterations before i since the method last measured it.
        """
        if not self.adaptive or self.decay_from is not None:
            return
        done, enough = i + 1, False
        if self.measured:
            enough = gain is not None and self._is_little(gain, i)
        elif len(scores) >= self.next_look:
            self.next_look = max(len(scores) + 1, int(_LOOKS * len(scores)))
            enough = self._not_worth_it(scores)
        if not self.measured and done % (self.step // 2) == 0 and len(scores) >= 2 * self.step:
            enough = enough or self._loss_stands_still(scores)
        if enough or done >= 0.7 * self.iterations:
            self.decay_from = done
            self.last = min(self.iterations, done + max(self.step // 2, done // 2))

    def _not_worth_it(self, scores: Sequence[Score]) -> bool:
        objectives, elbos, residuals, spreads = _columns(scores[-(len(scores) // 2) :])
        # both estimate the same: the one whose scores differ less from one iteration to the next (nan: not)
        nats = elbos if float(elbos.diff().square().sum()) < float(objectives.diff().square().sum()) else objectives
        spread = float(spreads.median())  # single paths may be anywhere
        worth = max(self.worth, self.part * spread) if math.isfinite(spread) else self.worth
        seen = min(1.0, len(nats) / 2 / self.step)  # of a step of work
        gain = Gain.of(nats)
        return gain.at_most <= seen * worth and not Gain.of(residuals).at_most > seen * math.log(2)

    def _is_little(self, gain: Gain, i: int) -> bool:
        """Of a gain measured after i iterations. A loss is none either: particles that are not those learned from."""
        passed, self.measured_at = i - self.measured_at, i
        seen = min(1.0, passed / max(self.step, i / 4))
        return i >= self.least and abs(gain.value) + _SURE * gain.stderr <= seen * self.worth

    def _loss_stands_still(self, scores: Sequence[Score]) -> bool:
        """Of iterations that do not know the objective."""
        objectives, _, residuals, _ = _columns(scores[-2 * self.step :])
        if not bool(objectives.isnan().all()):
            return False
        old, new = residuals[: self.step], residuals[self.step :]
        noise = math.sqrt(float(new.var() + old.var()) / self.step)
        return float(new.mean() - old.mean()) < _NOISE * noise

    def state(self) -> dict[str, Any]:
        return {
            "decay_from": self.decay_from,
            "last": self.last,
            "next_look": self.next_look,
            "measured_at": self.measured_at,
        }

    def restore(self, state: dict[str, Any]) -> None:
        if self.adaptive:
            self.decay_from, self.last = state["decay_from"], state["last"]
            self.next_look = state.get("next_look", self.next_look)  # checkpoints of earlier versions looked otherwise
            self.measured_at = state.get("measured_at", self.measured_at)


def _columns(scores: Sequence[Score]) -> tuple[Tensor, ...]:
    return torch.tensor(scores, dtype=torch.float64).unbind(1)
