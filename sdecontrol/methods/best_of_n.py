"""``BestOfN``: choose among n samples of the reference (or of any control)."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..controls.base import Control
from ..controls.given import given_control
from ..errors import check_name
from ..evaluation.particle_solution import ParticleSettings, ParticleSolution
from ..problems.problem import ControlProblem
from ..tensors import as_float, check_count
from .base import ControlState, Method, Run, register

_SELECTIONS = {"best": "best", "softmax": "weights", "rejection": "rejection"}


@register
@dataclass(frozen=True)
class BestOfN(Method):
    """Each sample is chosen among ``n`` independent candidates; nothing is trained.

    One method with three rules of choice, since all else is shared: where candidates come from, and what n costs. To
    keep all candidates with their weights is ``solution.weighted_sample``, or :class:`SMC`.

    Args:
        n: candidates per sample.
        selection: "best": the one of the largest total reward. Its law is not the tilted one, alpha plays no part; its
            KL is known, at most ``log n - (n-1)/n`` (Beirami et al. 2401.01879). "softmax": one in proportion to its
            importance weight ``exp(R/alpha) dQ0/dP^u``: the exact law as n grows (sampling-importance-resampling, Rubin
            1987). "rejection": candidates are accepted with probability ``exp((R - bound)/alpha)``, n at a time until
            one is: the exact law.
        bound: an upper bound of reward - running cost, for "rejection".
        proposal: the candidates' control or solution; None: the reference (the only one for "rejection").
    """

    reference_steps: ClassVar[bool] = False
    fixed_target: ClassVar[bool] = False
    zero_weights: ClassVar[bool] = True
    n: int = 16
    selection: str = "best"
    bound: float | None = None
    proposal: Any = None

    default_iterations: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_count("n", self.n)
        check_name("selection", self.selection, _SELECTIONS)
        if (self.bound is not None) != (self.selection == "rejection"):
            raise ValueError(
                "bound, an upper bound of reward - running cost, goes with selection='rejection' and only with it; got "
                f"selection={self.selection!r}, bound={self.bound!r}."
            )
        if self.bound is not None:
            as_float("bound", self.bound)
            if self.proposal is not None:
                raise ValueError(
                    "proposal: rejection needs a bound of the weights, which is known for the reference only."
                )

    def setup(self, run: Run) -> nn.Module:
        return ControlState(given_control(run.problem, self.proposal))

    def make_solution(self, problem: ControlProblem, control: Control, **facts: Any) -> ParticleSolution:
        particles = ParticleSettings(
            self.n,
            ess_threshold=0.0,
            selection=_SELECTIONS[self.selection],
            independent=True,
            bound=None if self.bound is None else float(self.bound),
        )
        return ParticleSolution(problem, control, particles=particles, **facts)
