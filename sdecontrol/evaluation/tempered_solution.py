"""``TemperedSolution``: a solution that is a way of sampling by tempered particles."""

from collections.abc import Callable
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..chains.base import Chain
from ..controls.given import ZeroControl
from ..controls.mixture import MixtureControl
from ..controls.saved import Context, Saved
from ..files.contents import part_of, with_part
from ..particles.ascent import adapt
from ..particles.levels import EventLadder, climb, run_events
from ..particles.noncentred import MappedLaw
from ..particles.smc import Particles, ParticleSettings
from ..particles.tempering import Ladder, NoiseTarget, Population, StateTarget, run_tempered
from ..paths.chunks import check_chunk
from ..paths.rows import between_ranks
from ..problems.problem import ControlProblem
from ..randomness import fresh_seed
from ..tensors import check_count
from .particle_solution import ParticleSolution
from .second_look import Ways
from .solution import SOLUTIONS

WIDER = 1.2  # variances of a fitted mixture that particles begin with: weights of its tails stay bounded


@dataclass(frozen=True)
class TemperedSettings:
    """How tempered particles are run.

    Attributes:
        space: "states" (the density's own, Gibbs problems only) or "noises" (paths as functions of their noises).
        gradient: move by gradients, or without.
        width: of the Gaussian that a Gibbs problem's particles begin with, in units of the reference's end.
        mixture: begin with the law of a :class:`MixtureControl` instead, a little widened.
        events: go up a ladder of noise scales, or of events of a level function, in place of temperatures
            (``particles/levels.py``).
    """

    space: str
    gradient: bool
    width: float = 2.0
    mixture: bool = False
    events: bool = False


def tempered_target(
    problem: ControlProblem, chain: Chain, control: Any, settings: TemperedSettings, mapped: MappedLaw | None = None
) -> StateTarget | NoiseTarget:
    """The target of tempered particles for a problem.

    Args:
        mapped: where there is one, particles begin with it in the place of the mixture of the control, and move in its
            coordinates.

    Raises:
        ValueError: space="states" where the problem is no Gibbs problem; or a problem with conditions.
    """
    if problem.condition is not None:
        raise ValueError("condition: tempered particles need one target; make a problem with the condition fixed.")
    if settings.space == "noises":
        target = NoiseTarget(problem, chain, None if isinstance(control, ZeroControl) else control)
    else:
        if problem.density is None:
            raise ValueError("space='states' needs a gibbs_problem, whose density is known; use space='noises'.")
        width, law, maps = settings.width, None, None
        if settings.mixture:
            assert isinstance(control, MixtureControl)
            width, law = 1.0, (control if mapped is None else mapped).law.widened(WIDER)
            maps = None if mapped is None else mapped.maps
        scale = width * problem.scale.expand(problem.dim)
        target = StateTarget(problem.density, problem.centre, scale, law=law, maps=maps)
    target.smooth = settings.gradient
    return target


def _ends(problem: ControlProblem, target: StateTarget | NoiseTarget, z: Tensor, origin: Tensor) -> list[Tensor]:
    """States at the end, with running costs, log-ratios and rewards."""
    if isinstance(target, StateTarget):
        end = target.states(z)
        nothing = torch.zeros_like(reward := problem.reward(end))
        return [end, nothing, nothing, reward]
    paths = target.paths(z, origin, keep="end")
    return [paths.end, paths.cost, paths.log_ratio(), paths.reward]  # pyright: ignore[reportReturnType]


@SOLUTIONS.register("tempered")
class TemperedSolution(ParticleSolution):
    """A :class:`ParticleSolution` whose systems are tempered from a Gaussian, or a mixture of them, to the target on a
    fixed ladder.

    Attributes:
        ladder: levels and kernels, chosen by a run of its own, so that ``E Z^ = Z`` for every later one.
        evaluations: of the log density or path reward so far (with its gradient where gradients are used), all runs
            together.
        mapped: the law that particles begin with, where it is one of non-centred coordinates; then the control is
            towards a mixture that only comes near to it.
    """

    parts = ("twist", "ladder", "located", "mapped")

    def __init__(
        self,
        *args: Any,
        particles: ParticleSettings,
        tempering: TemperedSettings,
        ladder: Ladder | EventLadder | None = None,
        level: Callable[[Tensor], Tensor] | None = None,
        mapped: MappedLaw | None = None,
        **facts: Any,
    ) -> None:
        super().__init__(*args, particles=particles, **facts)
        self.evaluations, self.level, self.mapped = 0, level, mapped
        self.target = tempered_target(self.problem, self.chain, self.control, tempering, mapped)
        if ladder is None:
            with self.problem.evaluating():
                ladder, first = self._adapted(particles.num_particles, fresh_seed(self.seed))
            self.evaluations += first.evaluations
        self.tempering = replace(tempering, events=isinstance(ladder, EventLadder))
        self.ladder = ladder

    def _adapted(self, particles: int, seed: int) -> tuple[Ladder | EventLadder, Population]:
        """A ladder of temperatures; of noise scales where hardly any path has a reward that is a number; of events
        where there is a level function."""
        target = self.target
        if isinstance(target, NoiseTarget):
            return climb(target, particles, seed, self.level)
        return adapt(target, particles, seed)

    @torch.no_grad()
    def run(
        self, systems: int, seed: int | None = None, *, condition: Any = None, batch_size: int | None = None
    ) -> Particles:
        check_count("n", systems)
        if batch_size is not None:
            check_chunk(batch_size, "end", name="batch_size")
        target = copy(self.target)
        target.batch_size = batch_size
        with self.problem.evaluating():
            size, seed = self.particles.num_particles, fresh_seed(seed)
            if isinstance(self.ladder, EventLadder):
                assert isinstance(target, NoiseTarget)
                found = run_events(target, self.ladder, systems, size, seed, self.level)
            else:
                found = run_tempered(target, self.ladder, systems, size, seed)
            self.evaluations += found.evaluations
            flat, shape = found.z.flatten(0, 1), found.log_weights.shape
            origin = found.origin.flatten(0, 1)
            ends = partial(_ends, self.problem, target)
            end, cost, ratio, reward = between_ranks(ends, batch_size, flat, origin)
            if isinstance(target, StateTarget):
                self.evaluations += len(end)
        return Particles(
            end=end.unflatten(0, shape),
            log_weights=found.log_weights,
            log_z=found.log_z,
            reward=reward.double().unflatten(0, shape),
            running_cost=cost.double().unflatten(0, shape),
            log_ratio=ratio.double().unflatten(0, shape),
            condition=None,
            ess=found.ess,
            resampled=found.resampled,
        )

    def _other_ways(self) -> Ways:
        own = self.tempering
        if own.space == "noises" and self.problem.density is None:
            return Ways(width=None)
        return Ways(width=1.0 if own.mixture else 2 * own.width)

    def _rows(self, found: Particles) -> int:
        return found.log_weights.numel() * self.ladder.work

    # ---------------------------------------------------------------- files

    @property
    def configuration(self) -> dict[str, Any]:
        return {
            **super().configuration,
            "tempering": asdict(self.tempering),
            "level": self.level is not None,
        }

    def _tensors(self) -> dict[str, Tensor]:
        found = super()._tensors() | with_part("ladder", vars(self.ladder))
        if self.mapped is not None:
            found |= with_part("mapped", self.mapped.tensors)
        statement = getattr(self.problem, "statement", None)
        if statement is None or statement.highest is None:
            return found
        # a reference that was put where the particles are
        highest = statement.centre.new_tensor(statement.highest, dtype=torch.float64)
        own = {"centre": statement.centre, "scale": statement.scale, "highest": highest}
        return found | with_part("located", own)

    @classmethod
    def problem_of(cls, problem: Any, tensors: dict[str, Tensor]) -> Any:
        own = part_of(tensors, "located")
        return problem.located(own["centre"], own["scale"], float(own["highest"])) if own else problem

    @classmethod
    def from_saved(cls, saved: Saved, context: Context, tensors: dict[str, Tensor]) -> dict[str, Any]:
        tempering = Saved(saved["tempering"], saved.where).settings(TemperedSettings)
        kind: Any = EventLadder if tempering.events else Ladder
        ladder = Saved(part_of(tensors, "ladder"), f"{saved.where}'s ladder").settings(kind)
        level = context.own_value("level function") if dict(saved).get("level") else None
        mapped = part_of(tensors, "mapped")
        found = {"tempering": tempering, "ladder": ladder, "level": level}
        found["mapped"] = MappedLaw.of(mapped) if mapped else None
        return {**super().from_saved(saved, context, tensors), **found}
