"""``SMC``: sequential Monte Carlo over the paths of any proposal, twisted by any value (Feynman-Kac)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..chains.base import Chain
from ..controls.base import Control
from ..controls.given import given_control
from ..controls.guidance import AnnealedValue, GivenValue, LogValue, TweedieValue, ValueControl
from ..errors import check_name
from ..evaluation.particle_solution import ParticleSettings, ParticleSolution
from ..particles.smc import RESAMPLING
from ..problems.problem import ControlProblem
from ..tensors import check_count
from .base import ControlState, Method, Run, register

_TWISTS = ("proposal", "tweedie")


@register
@dataclass(frozen=True)
class SMC(Method):
    """Particles that follow a proposal, are weighted towards the exact law and resampled where weights degenerate.

    Whatever the proposal and the twist, ``E Z^ = Z`` at every step size and number of particles, and samples approach
    the exact law as the number grows. See ``particles/smc.py`` for the recursion and its sources.

    Args:
        num_particles: N of a system.
        proposal: what moves the particles: None, the reference; a control; a solution; or a method, which is run first
            (guidance, or any that trains a control): the iterations of ``solve`` are then its own.
        twist: ``log psi_k``, what weighs particles before the end. None: only the running cost and the proposal's
            likelihood ratio (for annealed Langevin the annealed density, so that particles are weighed towards
            ``pi_t``). "proposal": the value that guides the proposal. "tweedie": the reward of the denoised state. A
            function ``v(x, t) -> (batch,)``, t ``(batch,)``: a value, divided by alpha here. It need not be exact for
            ``E Z^ = Z``.
        ess_threshold: effective fraction of a system's weights below which it is resampled; 0 never, 1 at every step.
        resampling: "systematic", "stratified" or "multinomial".
        independent: draw every sample from a system of its own (independent samples, for N times the work). Otherwise n
            samples come from n/N systems together, and samples of one system share ancestors.
    """

    reference_steps: ClassVar[bool] = False
    fixed_target: ClassVar[bool] = False
    num_particles: int = 256
    proposal: Any = None
    twist: str | Callable[..., Tensor] | None = None
    ess_threshold: float = 0.5
    resampling: str = "systematic"
    independent: bool = False

    def __post_init__(self) -> None:
        check_count("num_particles", self.num_particles)
        if not 0 <= self.ess_threshold <= 1:
            raise ValueError(f"ess_threshold must be a fraction from 0 to 1, got {self.ess_threshold!r}.")
        check_name("resampling", self.resampling, RESAMPLING)
        if isinstance(self.twist, str):
            check_name("twist", self.twist, _TWISTS)
        elif self.twist is not None and not callable(self.twist):
            raise TypeError(
                f"twist must be None, one of {', '.join(_TWISTS)} or a function (x, t) -> (batch,), got "
                f"{type(self.twist).__name__}."
            )

    @property
    def zero_weights(self) -> bool:  # type: ignore[override]
        return not isinstance(self.proposal, Method) or self.proposal.zero_weights

    @property
    def default_iterations(self) -> int:  # type: ignore[override]
        return self.proposal.default_iterations if isinstance(self.proposal, Method) else 0

    @property
    def residual(self) -> bool:  # type: ignore[override]
        return isinstance(self.proposal, Method) and self.proposal.residual

    @property
    def averaging(self) -> float:  # type: ignore[override]
        return (self.proposal if isinstance(self.proposal, Method) else Method).averaging

    @property
    def splits(self) -> bool:  # type: ignore[override]
        return isinstance(self.proposal, Method) and self.proposal.splits

    @property
    def anneals(self) -> bool:  # type: ignore[override]
        return isinstance(self.proposal, Method) and self.proposal.anneals

    def check(self, problem: ControlProblem) -> None:
        super().check(problem)
        if isinstance(self.proposal, Method):
            self.proposal.check(problem)

    def setup(self, run: Run) -> nn.Module:
        if isinstance(self.proposal, Method):
            state = self.proposal.setup(run)
        else:
            state = ControlState(given_control(run.problem, self.proposal))
        self._twist(run.problem, run.chain, self.finish(state, run))  # what is wrong is said before anything is trained
        return state

    def step(self, state: Any, run: Run) -> dict[str, float]:
        return self.proposal.step(state, run)

    def finish(self, state: Any, run: Run) -> Control:
        return self.proposal.finish(state, run) if isinstance(self.proposal, Method) else super().finish(state, run)

    def _twist(self, problem: ControlProblem, chain: Chain, control: Control) -> LogValue | None:
        if self.twist == "proposal":
            if not isinstance(control, ValueControl):
                raise ValueError(
                    "twist='proposal' is the value that guides the proposal, but this proposal has none: pass proposal="
                    "sc.ValueGuidance(...) or its solution, or the value itself as twist=v."
                )
            return control.value
        if self.twist == "tweedie":
            return TweedieValue(problem, chain)
        if self.twist is None and problem.reference.reverse_target:
            return AnnealedValue(problem)
        return GivenValue(self.twist, problem.alpha) if callable(self.twist) else None

    def make_solution(self, problem: ControlProblem, control: Control, **facts: Any) -> ParticleSolution:
        settings = facts["settings"]
        chain = problem.chain(settings["time_steps"], settings["scheme"])
        particles = ParticleSettings(
            self.num_particles, self.ess_threshold, self.resampling, independent=self.independent
        )
        return ParticleSolution(
            problem, control, particles=particles, twist=self._twist(problem, chain, control), **facts
        )
