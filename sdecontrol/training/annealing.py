"""Annealing of the temperature: high at first where the reward spreads over many nats, lowered as training goes on."""

import math
from typing import Any

_FIRST = 1e-3  # beta of the first iteration, which sees how far the reward spreads
_MOVE = 0.3  # of the target between two iterations: standard deviation of its log-ratio on the current paths
_LONGEST = 0.25  # part of the run at most


class Annealing:
    """The inverse temperature ``beta``, in units of ``1/alpha``, is raised from near 0 to 1: the target
    ``exp(beta R/alpha) Q0`` moves by ``_MOVE^2/2`` nats an iteration.

    From the reference a reward of hundreds of nats is a target that no path comes near: score functions and path losses
    then see one path in each batch, and end at the mode that it was in. A reward that spreads over less than ``_MOVE``
    nats is taken whole after one iteration. The rate is that of annealed importance sampling with equal distances
    between neighbours; what is trained at the end is the problem itself.
    """

    def __init__(self, active: bool) -> None:
        self.beta = _FIRST if active else 1.0
        self.first: float | None = None
        self.iterations = 0  # with beta below 1

    @property
    def active(self) -> bool:
        return self.beta < 1

    def observe(self, spread: float, part: float) -> None:
        """Lower the temperature after an iteration.

        Args:
            spread: standard deviation of R/alpha on its paths; nan: unknown, then the reward is taken whole.
            part: of the run that is over.
        """
        self.iterations += 1
        move = _MOVE / max(spread, 1e-300) if math.isfinite(spread) else 1.0
        if self.first is None:
            self.beta = self.first = min(1.0, move)
            return
        due = self.first ** max(0.0, 1 - part / _LONGEST)
        self.beta = min(1.0, max(self.beta + move, due))

    def state(self) -> dict[str, Any]:
        return {"beta": self.beta, "first": self.first, "iterations": self.iterations}

    def restore(self, state: dict[str, Any]) -> None:
        self.beta, self.first, self.iterations = state["beta"], state["first"], state["iterations"]
