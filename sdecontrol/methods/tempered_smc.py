"""``TemperedSMC``: particles tempered from a Gaussian to the target, moved by Hamiltonian Monte Carlo."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..controls.base import Control
from ..controls.given import given_control
from ..errors import check_name
from ..evaluation.particle_solution import ParticleSettings
from ..evaluation.tempered_solution import TemperedSettings, TemperedSolution, tempered_target
from ..problems.problem import ControlProblem
from ..tensors import check_count, check_positive
from .base import ControlState, Method, Run, register

SPACES = ("auto", "states", "noises")


@register
@dataclass(frozen=True)
class TemperedSMC(Method):
    """Adaptive tempering with sequential Monte Carlo: nothing is learned but the ladder of temperatures and its moves.

    A first run of ``num_particles`` chooses levels, Gaussian preconditioners, step sizes and numbers of moves; every
    sample and estimate then comes from systems run on that ladder, so that ``E Z^ = Z``. For a Gibbs problem particles
    live in the states of the density, for all others in the noises of the paths (``particles/tempering.py``), where the
    target is exact on the chain at every step size and no gradient is needed. The baseline that learned samplers are
    held against.

    Args:
        num_particles: of a system.
        space: "states" or "noises"; "auto": states for Gibbs problems.
        gradient: Hamiltonian moves by the gradient of the log density; None: in the space of states where there is one
            (a gradient through a whole path costs more than it moves).
        proposal: in the space of noises, a control or solution whose paths the particles are; None: the reference.
        level: ``phi(x) -> (batch,)`` of the (decoded) end of a path, the smaller the nearer to where the reward is a
            number, if that is known of a rare event (a reward of -inf at nearly all paths): particles then go through
            ``{phi <= q}`` for falling q, which the first run chooses and freezes. None: where fewer than a tenth of the
            reference's paths have a reward that is a number, particles begin with so much more noise that enough have,
            and go through falling scales of it (``particles/levels.py``). No file holds it: it is given again to
            ``load(..., value=level)``.
        width: of the Gaussian that the particles of a Gibbs problem begin with, in units of the reference's end: wide
            enough for all modes.

    Raises:
        ValueError: a problem with conditions; states asked of a problem that is no Gibbs problem. NonFiniteError: a log
            density that is nan, +inf,
        or -inf everywhere at the start.
    """

    reference_steps: ClassVar[bool] = False
    fixed_target: ClassVar[bool] = False
    zero_weights: ClassVar[bool] = True
    num_particles: int = 1024
    space: str = "auto"
    gradient: bool | None = None
    proposal: Any = None
    width: float = 2.0
    level: Callable[[Tensor], Tensor] | None = None

    default_iterations: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_count("num_particles", self.num_particles, 16)
        check_positive("width", self.width)
        check_name("space", self.space, SPACES)
        if self.level is not None and not callable(self.level):
            raise TypeError(f"level must be a function x -> (batch,) or None, got {type(self.level).__name__}.")

    def _settings(self, problem: ControlProblem) -> TemperedSettings:
        space = self.space
        if space == "auto":
            space = "states" if problem.density is not None and self.proposal is None else "noises"
        gradient = problem.has_gradient and space == "states" if self.gradient is None else self.gradient
        return TemperedSettings(space, gradient, float(self.width))

    def check(self, problem: ControlProblem) -> None:
        super().check(problem)
        settings = self._settings(problem)
        if settings.gradient and not problem.has_gradient:
            raise ValueError("gradient=True, but the reward has no gradient; leave gradient out.")
        if settings.space == "states" and self.proposal is not None:
            raise ValueError("proposal moves paths: it goes with space='noises'.")
        if settings.space == "states" and self.level is not None:
            raise ValueError("level is a function of the ends of paths: it goes with space='noises'.")

    def setup(self, run: Run) -> nn.Module:
        control = given_control(run.problem, self.proposal)
        tempered_target(run.problem, run.chain, control, self._settings(run.problem))  # what is wrong is said early
        return ControlState(control)

    def make_solution(self, problem: ControlProblem, control: Control, **facts: Any) -> TemperedSolution:
        return TemperedSolution(
            problem,
            control,
            particles=ParticleSettings(self.num_particles),
            tempering=self._settings(problem),
            level=self.level,
            **facts,
        )
