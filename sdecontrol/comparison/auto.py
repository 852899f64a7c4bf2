"""``Auto``: sequential Monte Carlo that learns where to begin, and keeps what pays."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..controls.base import Control
from ..controls.given import given_control
from ..controls.mixture import MixtureControl
from ..evaluation.estimates import Estimate
from ..evaluation.particle_solution import ParticleSettings
from ..evaluation.tempered_solution import TemperedSettings, TemperedSolution, tempered_target
from ..methods.adaptive_importance import AdaptiveImportance
from ..methods.base import Method, Run, register
from ..particles.mixture_fit import fit_mixture
from ..particles.tempering import Ladder, Population, adapt
from ..problems.pilot import search
from ..problems.problem import ControlProblem
from ..randomness import Place, derive_seed
from ..tensors import check_count

_FEW, _FEW_WITHOUT = 100_000, 1_000_000  # evaluations below which no particles are moved, with and without a gradient
_SAME, _SIGMAS = 0.02, 3.0  # nats and standard errors within which two rounds agree on log Z
_GAIN = 0.8  # of the cost, below which a round was worth it
_MOST_UNCHANGED = 2  # rounds without a change, after which no more are made
_LOST = 0.1  # nats of log Z below the population that is kept, at which a round does not take its place
# Nats and errors below the first round's log Z at which the mixture has lost something: the error of one system that
# has chosen its own ladder leaves out what its moves do not forget, and is several times too small where levels are
# many.
_WORSE, _WORSE_SIGMAS = 0.5, 10.0
_FIRST = 4  # the first round's part of the particles: it only has to find something
_SEARCHED = 4  # particles of a round for one chain of the search
_LAST_MOVES = 12  # of a round at the target: they go where the mixture does not reach yet


class _State(nn.Module):
    """Two populations of particles (of the last round, and of the one before it that found most; at first, of the
    search), and what rounds cost."""

    z: Tensor
    log_weights: Tensor
    log_z: Tensor
    cost: Tensor
    seen: Tensor
    spent: Tensor
    unchanged: Tensor

    def __init__(self, run: Run, size: int) -> None:
        super().__init__()
        problem = run.problem
        numbers: dict[str, Any] = {"dtype": torch.float64, "device": problem.device}
        buffers = {
            "z": torch.zeros(2, size, problem.event_shape[0], dtype=problem.dtype, device=problem.device),
            "log_weights": torch.zeros(2, size, **numbers),
            "log_z": torch.full((2,), -math.inf, **numbers),
            # of the first round, of the last one, and of the best before it: evaluations that bring the error of log Z
            # to one nat
            "cost": torch.full((3,), math.inf, **numbers),
            # log Z of the first round and of the one before the last (-inf at first); standard errors of the last and
            # of the first
            "seen": torch.full((4,), math.nan, **numbers),
            "spent": torch.zeros((), dtype=torch.long, device=problem.device),
            "unchanged": torch.zeros((), dtype=torch.long, device=problem.device),  # rounds without a change
        }
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self._law: Any = None
        before = problem.density.values
        place = derive_seed(run.seed, Place.AUTO_SEARCH)
        ends = search(problem.density, problem.centre, problem.scale, size // _SEARCHED, place)
        self.spent += problem.density.values - before
        self.z[1, : len(ends)] = (ends - problem.centre) / problem.scale
        self.log_weights[1] = -math.inf
        self.log_weights[1, : len(ends)] = -math.log(max(1, len(ends)))

    def law(self, run: Run, rounds: int, most: int) -> Any:
        """The mixture fitted to both populations after so many rounds; None before the first."""
        if self._law is None and bool(self.log_z[0] > -math.inf):
            self._law = fit_mixture(
                self.z.flatten(0, 1),
                self.log_weights.flatten(),
                seed=derive_seed(run.seed, Place.AUTO_FIT, rounds),
                most=most,
            )
        return self._law

    def add(self, z: Tensor, found: Population, ladder: Ladder) -> float:
        """Keep a round's particles; the variance of its log Z^ times its particles."""
        first = not bool(torch.isfinite(self.cost[0]))
        # the first round has none before it: the ends of the search stay for the first mixture
        if not first and bool(self.log_z[0] >= self.log_z[1] - _LOST):
            for kept in (self.z, self.log_weights, self.log_z):
                kept[1] = kept[0]
        self.log_weights[0] = -math.inf
        self.z[0, : len(z)], self.log_weights[0, : len(z)] = z, found.log_weights[0]
        # what is left of the weights at each resampling, and at the end
        last = torch.arange(len(ladder), device=z.device) == len(ladder) - 1
        variance = float(((1 / found.ess - 1) * ((found.resampled > 0) | last)).sum())
        self.cost[2] = torch.minimum(self.cost[1], self.cost[2])
        self.cost[1] = variance * found.evaluations / len(z)
        self.seen[1], self.seen[2] = self.log_z[0], math.sqrt(variance / len(z))
        self.log_z[0] = found.log_z[0]
        if first:
            self.cost[0], self.seen[0], self.seen[3] = self.cost[1], found.log_z[0], self.seen[2]
        self.spent += found.evaluations
        self._law = None
        same = abs(float(self.log_z[0] - self.seen[1])) < max(_SAME, _SIGMAS * float(self.seen[2]))
        settled = same and float(self.cost[1]) > _GAIN * float(self.cost[2])
        self.unchanged.fill_(int(self.unchanged) + 1 if settled else 0)
        return variance


@register
@dataclass(frozen=True)
class Auto(Method):
    """For a Gibbs problem: tuned SMC first, a mixture of Gaussians learned from its particles, SMC from that mixture,
    and again.

    1. Particles are tempered from a wide Gaussian to the target (:class:`TemperedSMC`), and short chains search for
       modes from far out.
    2. A mixture of Gaussians is fitted to both (``particles/mixture_fit.py``).
    3. New particles are tempered from the mixture, a little widened, with independent draws from it among their moves.
       A better beginning needs fewer levels, and reaches what the wide Gaussian could not: the neck of a funnel is
       entered a little further in every round.

    Rounds end when neither log Z nor what it costs changes any more. Kept is what needs fewer evaluations for the same
    error of log Z: the tempering from the mixture, or, where learning did not pay, that from the Gaussian;
    ``solution.details["report"]`` says which and why. Samples and estimates then come from new particles on a fixed
    ladder, so that ``E Z^ = Z``. ``solution.control`` is the exact control of the problem's reference towards the
    mixture (:class:`MixtureControl`): paths with exact weights, for ``certify`` and as the start of other methods.

    However easy the density, the search for modes costs 0.4 million evaluations with the default number of particles (2
    million without a gradient).

    Args:
        num_particles: of a round (a quarter in the first), and of each system of the solution. evaluations: of the log
            density at which no new round begins; the pilot run, the round that has begun and ``evaluate`` come on top.
            Below 1e5 (1e6 of a density without a gradient) they are all there is, and :class:`AdaptiveImportance`
            takes the place of particles.
        components: of the mixture at most.

    Raises:
        ValueError: no Gibbs problem, or one with conditions or without a reference of known end.
    """

    num_particles: int = 8192
    evaluations: int = 20_000_000
    components: int = 64

    anytime: ClassVar[bool] = True
    default_iterations: ClassVar[int] = 12
    steady: ClassVar[bool] = True
    takes_control: ClassVar[bool] = False
    estimates: ClassVar[str | None] = "log_z"

    def __post_init__(self) -> None:
        check_count("num_particles", self.num_particles, 64)
        check_count("evaluations", self.evaluations)
        check_count("components", self.components)

    def prepare(self, problem: ControlProblem) -> tuple[Method, ControlProblem]:
        if problem.density is not None and problem.condition is None:
            few = _FEW if problem.has_gradient else _FEW_WITHOUT
            if self.evaluations < few:
                return AdaptiveImportance(self.evaluations, min(16, self.components)).prepare(problem)
        return self, problem

    def check(self, problem: ControlProblem) -> None:
        super().check(problem)
        if problem.density is None:
            raise ValueError(
                "auto is for gibbs_problem; sc.recommend(problem) says which method suits another problem."
            )
        if problem.condition is not None:
            raise ValueError("auto: particles need one target; make a problem with the condition fixed.")

    def setup(self, run: Run) -> nn.Module:
        return _State(run, self.num_particles)

    @torch.no_grad()
    def step(self, state: nn.Module, run: Run) -> dict[str, float]:
        assert isinstance(state, _State)
        problem = run.problem
        law = state.law(run, run.iteration, self.components)
        control = None if law is None else MixtureControl(problem, law)
        settings = TemperedSettings("states", problem.has_gradient, mixture=law is not None)
        target: Any = tempered_target(problem, run.chain, control, settings)
        seed = derive_seed(run.seed, Place.AUTO_ROUND, run.iteration)
        if law is None:
            ladder, found = adapt(target, max(64, self.num_particles // _FIRST), seed, last_moves=1)
        else:
            ladder, found = adapt(target, self.num_particles, seed, last_moves=_LAST_MOVES)
        z = (target.states(found.z[0]) - problem.centre) / problem.scale
        variance = state.add(z, found, ladder)
        assert found.variance is not None
        error = math.sqrt(found.variance)
        return {
            "objective": float(found.log_z[0]),
            "objective_stderr": error,
            "log_z": float(found.log_z[0]),
            "log_z_stderr": error,
            "levels": float(len(ladder)),
            "evaluations": float(state.spent),
            "cost": float(state.cost[1]),
            "ess": 1 / (1 + variance),
            "loss": variance,
        }

    def finished(self, state: nn.Module, run: Run) -> bool:
        assert isinstance(state, _State)
        return int(state.spent) >= self.evaluations or int(state.unchanged) >= _MOST_UNCHANGED

    def finish(self, state: nn.Module, run: Run) -> Control:
        assert isinstance(state, _State)
        law = state.law(run, run.iteration + 1, self.components)
        lost = float(state.seen[0] - state.log_z[0]) > max(_WORSE, _WORSE_SIGMAS * float(state.seen[2:].norm()))
        if law is None or lost or not float(state.cost[1:].min()) < float(state.cost[0]):
            return given_control(run.problem, None)
        return MixtureControl(run.problem, law)

    def make_solution(self, problem: ControlProblem, control: Control, **facts: Any) -> TemperedSolution:
        return TemperedSolution(
            problem,
            control,
            particles=ParticleSettings(self.num_particles),
            tempering=TemperedSettings("states", problem.has_gradient, mixture=isinstance(control, MixtureControl)),
            details={"report": _report(facts["history"], control)},
            **facts,
        )


def _report(history: list[dict[str, float]], control: Control) -> str:
    """What each round began with, found and cost, and what was kept."""
    lines = []
    for i, row in enumerate(history):
        start = "a wide Gaussian" if i == 0 else "the mixture"
        levels = int(row["levels"])
        lines.append(
            f"round {i + 1}, from {start}: log Z {Estimate(row['log_z'], row['objective_stderr'])}, {levels} "
            f"level{'s' if levels > 1 else ''}, {row['cost']:.3g} evaluations to know log Z to one nat"
        )
    if isinstance(control, MixtureControl):
        lines.append(f"kept: tempering from {control.law!r}")
    else:
        paid = any(row["cost"] < history[0]["cost"] for row in history)
        why = "rounds from the mixture found less" if paid else "learning did not pay"
        lines.append(f"kept: tempering from the wide Gaussian; {why}")
    return "\n".join(lines)
