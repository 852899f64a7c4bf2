"""``Auto``: sequential Monte Carlo that learns where to begin, and keeps what pays."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..controls.base import Control
from ..controls.given import given_control
from ..controls.mixture import MixtureControl
from ..evaluation.estimates import Estimate, log_mean_weight, pareto_k
from ..evaluation.importance_solution import ImportanceSolution, located_draws
from ..evaluation.particle_solution import ParticleSettings
from ..evaluation.solution import Solution
from ..evaluation.tempered_solution import WIDER, TemperedSettings, TemperedSolution
from ..methods.adaptive_importance import AdaptiveImportance
from ..methods.base import Method, Run, register
from ..particles.adaptive_importance import SYSTEMS
from ..particles.ascent import Ascent
from ..particles.mixture_fit import fit_mixture
from ..particles.noncentred import MappedLaw
from ..particles.resolution import covers
from ..particles.tempering import StateTarget, run_tempered, start_points
from ..paths.weights import effective_fraction
from ..problems.problem import ControlProblem
from ..randomness import Place, derive_seed
from ..tensors import check_count
from .rounds import GAUSSIAN, IMPORTANCE, MIXTURE, MOST_LEVELS, Allowance, Found, Rounds

# Evaluations up to which no particles are moved: with a gradient in many dimensions; in few, or without one.
_FEW, _FEW_IN_FEW, FEW_DIMENSIONS = 300_000, 1_000_000, 20
_MOST = 20_000_000  # with or without a gradient, at which no new round begins where no number was given
_MOST_ROUNDS, _MOST_UNCHANGED = 12, 2  # rounds in all, and without a change, after which no more are made
# Nats and errors below the first round's log Z at which the mixture has lost something: the error of one system that
# has chosen its own ladder leaves out what its moves do not forget, and is several times too small where levels are
# many.
_WORSE, _WORSE_SIGMAS = 0.5, 10.0
_FIRST = 4  # the first round's part of the particles: it only has to find something
_SEARCHED = 4  # particles of a round for one chain of the search
_LAST_MOVES = 12  # of a round at the target: they go where the mixture does not reach yet

# Of a number of evaluations: parts at which the first round, and all rounds end ...
_FIRST_PART, _ROUNDS_PART = 0.45, 0.6
_ROUND = 0.2  # ... and for one round; of a particle of the first one so many evaluations are expected, and so many
_EXPECTED, _LEAST = 400, 128  # particles it has at least
_TRIED_PART, TRIED = 0.02, 4096  # part of all, and number at most, that try importance sampling from the mixture
_LIGHT = 0.5  # Pareto k of its weights, below which it may be the estimate
_AT_ONCE = 4  # systems of the estimate
_FEWEST, _FEWEST_SYSTEMS = 16, 4  # particles of them, and of these


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

    ``evaluations=n`` or ``solve(..., budget="10m")`` bound everything: the pilot run, the search, the rounds, and an
    estimate of 16 systems of particles within ``solve``, which is what samples and estimates then come from (an
    :class:`ImportanceSolution`; nothing that is asked of it evaluates the density again). It goes the way that
    has the smallest error: on the ladder from the Gaussian, on that from the mixture, or by importance sampling from
    the mixture. So does a run that is interrupted (Ctrl-C) give what there is: the systems of the estimate, else the
    particles of the last round, of which the verdict says that they are no estimate yet.

    Without such bounds, and however easy the density, the search for modes costs 0.4 million evaluations with the
    default number of particles (2 million without a gradient), no new round begins after 2e7, and every evaluation and
    sample of the solution is of new particles.

    Args:
        num_particles: of a round (a quarter in the first), and of each system of the solution; at most, where
            evaluations or time are bounded.
        evaluations: of the log density, all together: a value with its gradient counts as two, and what the problem has
            spent before is among them. Up to 3e5 (1e6 in 20 dimensions or fewer, or without a gradient)
            :class:`AdaptiveImportance` takes the place of particles. None: not bounded.
        components: of the mixture at most.

    Raises:
        ValueError: no Gibbs problem, or one with conditions or without a reference of known end.
    """

    num_particles: int = 8192
    evaluations: int | None = None
    components: int = 64

    anytime: ClassVar[bool] = True
    default_iterations: ClassVar[int] = _MOST_ROUNDS + SYSTEMS // _AT_ONCE
    steady: ClassVar[bool] = True
    takes_control: ClassVar[bool] = False
    estimates: ClassVar[str | None] = "log_z"

    def __post_init__(self) -> None:
        check_count("num_particles", self.num_particles, 64)
        check_count("evaluations", self.evaluations, optional=True)
        check_count("components", self.components)

    def prepare(self, problem: ControlProblem) -> tuple[Method, ControlProblem]:
        if problem.density is not None and problem.condition is None:
            dear = not problem.has_gradient or problem.event_shape[0] <= FEW_DIMENSIONS
            if self.evaluations is not None and self.evaluations <= (_FEW_IN_FEW if dear else _FEW):
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
        problem: Any = run.problem
        allowance = Allowance(self.evaluations, sum(problem.spent.values()), run)
        return Rounds(run, self.num_particles, self.num_particles // _SEARCHED, allowance)

    @torch.no_grad()
    def step(self, state: Any, run: Run) -> dict[str, float]:
        if state.allowance.limited and (bool(state.ready) or not self._another(state, run)):
            state.ready.fill_(1)
            return self._estimate(state, run)
        return self._round(state, run)

    # ---------------------------------------------------------------- rounds

    def _round(self, state: Rounds, run: Run) -> dict[str, float]:
        problem, law = run.problem, state.law(run, self.components)
        target = self._target(run, law)
        seed = derive_seed(run.seed, Place.AUTO_ROUND, run.iteration)
        limited, before = state.allowance.limited, problem.density.evaluations
        part = _FIRST_PART if law is None else _ROUNDS_PART
        each = 2 if problem.has_gradient else 1

        def may(work: int) -> bool:
            used = state.used + problem.density.evaluations - before
            return state.allowance.may(used + each * work, part)

        ascent = Ascent(target, self._size(state, run), seed, last_moves=1 if law is None else _LAST_MOVES)
        try:
            ascent.climb(may if limited else None, MOST_LEVELS)
        except KeyboardInterrupt:
            state.partial = Found.by(ascent, target, problem.centre, problem.scale)
            raise
        ended = Found.by(ascent, target, problem.centre, problem.scale)
        variance, found = state.add(ended), ended.population
        state.spent += problem.density.evaluations - before
        assert found.variance is not None
        error = math.sqrt(found.variance)
        return {
            "objective": float(found.log_z[0]),
            "objective_stderr": error,
            "log_z": float(found.log_z[0]),
            "log_z_stderr": error,
            "levels": float(len(ended.ladder)),
            "evaluations": float(state.spent),
            "cost": float(state.cost[1]),
            "ess": 1 / (1 + variance),
            "loss": variance,
        }

    def _target(self, run: Run, law: Any) -> StateTarget:
        """From the wide Gaussian, or from a law, a little widened."""
        problem: Any = run.problem
        density, centre, scale = problem.density, problem.centre, problem.scale.expand(problem.dim)
        if law is None:
            return StateTarget(density, centre, TemperedSettings.width * scale, problem.has_gradient)
        maps = law.maps if law.maps.maps else None
        return StateTarget(density, centre, scale, problem.has_gradient, law.law.widened(WIDER), maps)

    def _size(self, state: Rounds, run: Run) -> int:
        """Particles of the next round."""
        first = not bool(state.rounds)
        size = max(64, self.num_particles // _FIRST) if first else self.num_particles
        worth = state.allowance.worth(state.used)
        if not (state.allowance.limited and math.isfinite(worth)):
            return size
        work = _EXPECTED if first else float(state.work)
        each = 2 if run.problem.has_gradient else 1
        return min(size, max(_LEAST, int(_ROUND * worth / (each * work))))

    def _another(self, state: Rounds, run: Run) -> bool:
        """Whether there is to be another round before the estimate."""
        if not bool(state.rounds):
            return True
        if int(state.rounds) >= _MOST_ROUNDS or int(state.unchanged) >= _MOST_UNCHANGED:
            return False
        each = 2 if run.problem.has_gradient else 1
        half = 0.5 * each * self._size(state, run) * float(state.work)
        return state.allowance.may(state.used + int(half), _ROUNDS_PART)

    # ---------------------------------------------------------------- the estimate

    def _estimate(self, state: Rounds, run: Run) -> dict[str, float]:
        """A few systems of particles; before the first of them the way is chosen."""
        problem, before = run.problem, run.problem.density.evaluations
        if int(state.way) < 0:
            self._choose(state, run)
        if not bool(state.systems_wanted):
            return {"log_z": float(state.log_z[0]), "systems": 0.0, "evaluations": float(state.spent)}
        way, count = int(state.way), min(_AT_ONCE, int(state.systems_wanted) - int(state.drawn))
        target = self._target(run, None if way == GAUSSIAN else state.law(run, self.components))
        target.smooth = target.smooth and way != IMPORTANCE
        seed, ladder = derive_seed(run.seed, Place.AUTO_ESTIMATE, int(state.drawn)), state.ladder()
        found = run_tempered(target, ladder, count, int(state.each), seed)
        level = target.log_density_at(found.z.flatten(0, 1), found.phi.flatten()).reshape(found.phi.shape)
        state.add_estimate(target.states(found.z.flatten(0, 1)).unflatten(0, level.shape), level, found)
        state.spent += problem.density.evaluations - before
        state.estimated += problem.density.evaluations - before
        log_w = state.log_w[: int(state.drawn), : int(state.each)]
        log_z = log_mean_weight(log_w.logsumexp(1) - math.log(log_w.shape[1]))
        return {
            "objective": log_z.value,
            "objective_stderr": log_z.stderr,
            "log_z": log_z.value,
            "log_z_stderr": log_z.stderr,
            "systems": float(state.drawn),
            "way": float(way),
            "evaluations": float(state.spent),
            "ess": float(effective_fraction(log_w.flatten().softmax(0))),
        }

    def _choose(self, state: Rounds, run: Run) -> None:
        """The way of the estimate that needs fewest evaluations for its error, and how many systems of how many
        particles there can be: fewer than 16 where these would be small, and none where they would be too few."""
        each, worth = 2 if run.problem.has_gradient else 1, state.allowance.worth(state.used)
        costs = {GAUSSIAN: each * float(state.cost[0])}
        if not _lost(state):
            costs[IMPORTANCE] = self._tried(state, run, worth)
            if int(state.rounds) > 1:
                costs[MIXTURE] = each * float(state.cost[1])
        left = math.inf if math.isinf(worth) else max(0.0, worth - state.used - TRIED)

        def most(way: int) -> float:
            """Particles in all."""
            state.way.fill_(way)
            ladder = state.ladder()
            work = ladder.work + (int(ladder.moves.sum()) if way == MIXTURE else 0)
            return left / (work * (1 if way == IMPORTANCE else each))

        order = sorted(costs, key=lambda w: costs[w])
        # the cheapest of those that leave enough particles; the last resort asks for the least
        enough = (
            next((w for w in order if most(w) >= systems * _FEWEST), None) for systems in (SYSTEMS, _FEWEST_SYSTEMS)
        )
        total = most(next((w for w in enough if w is not None), IMPORTANCE))
        systems = int(min(SYSTEMS, total / _FEWEST))
        systems = systems if systems >= _FEWEST_SYSTEMS else 0
        state.systems_wanted.fill_(systems)
        state.each.fill_(int(min(total / systems, state.x.shape[1])) if systems else 0)

    def _tried(self, state: Rounds, run: Run, worth: float) -> float:
        """Evaluations that bring the error of log Z to one nat by draws of the mixture; inf where weights are heavy."""
        target = self._target(run, state.law(run, self.components))
        target.smooth = False
        n = int(min(TRIED, _TRIED_PART * worth))
        phi = start_points(target, n, derive_seed(run.seed, Place.AUTO_TRIED)).phi
        if pareto_k(phi) >= _LIGHT:
            return math.inf
        return 1 / float(effective_fraction(phi.double().softmax(0))) - 1

    # ---------------------------------------------------------------- the end

    def finished(self, state: Any, run: Run) -> bool:
        if state.allowance.limited:
            return bool(state.ready) and int(state.drawn) >= int(state.systems_wanted)
        most = _MOST * (2 if run.problem.has_gradient else 1)
        over = int(state.spent) >= most or int(state.rounds) >= _MOST_ROUNDS
        return over or int(state.unchanged) >= _MOST_UNCHANGED

    def finish(self, state: Any, run: Run) -> Control:
        law = state.mixture(run, self.components)
        if law is None or _lost(state) or not float(state.cost[1:].min()) < float(state.cost[0]):
            return given_control(run.problem, None)
        return MixtureControl(run.problem, law)

    def solution(self, state: Any, run: Run, problem: ControlProblem, **facts: Any) -> Solution:
        limited, own = state.allowance.limited, run.problem
        if not limited and facts["reproducible"]:
            where, control = self._covered(state, run, self.finish(state, run))
            law, mapped = state.law(run, self.components), None
            if isinstance(control, MixtureControl) and law is not None and law.maps.maps:
                mapped = law.moved((own.centre - where.centre) / where.scale, own.scale / where.scale)
            return self.make_solution(where, control, mapped=mapped, **facts)
        if not state.found:  # the time was over before the first round had any: its first particles, unmoved
            target = self._target(run, None)
            ascent = Ascent(target, _LEAST, derive_seed(run.seed, Place.AUTO_UNMOVED))
            state.partial = Found.by(ascent, target, own.centre, own.scale)
        systems = state.systems(own)
        how: dict[str, Any] = {"components": self.components, "highest": systems[1].max()}
        how["estimated"] = state.has_estimate
        how["unit"] = 1 if state.has_estimate and int(state.way) == IMPORTANCE else None
        draws, law = located_draws(problem, systems, run.seed, **how)
        located: Any = problem.located(draws.centre, draws.scale, float(draws.highest))  # type: ignore[attr-defined]
        return ImportanceSolution(
            located,
            MixtureControl(located, law),
            particles=ParticleSettings(draws.log_w.shape[1]),
            draws=draws,
            details={"evaluations": _counted(state, located), "report": _report(facts["history"], law)},
            **facts,
        )

    def _covered(self, state: Rounds, run: Run, control: Control) -> tuple[Any, Control]:
        """The problem, with a reference that covers the particles where its own does not, and the control on it."""
        problem: Any = run.problem
        x, log_w = problem.centre + problem.scale * state.z.double(), state.log_weights
        alive = log_w[0] > -math.inf
        if covers(problem, x[0, alive], log_w[0, alive]):
            return problem, control
        draws, _ = located_draws(problem, state.systems(problem), run.seed, components=1, highest=state.level.max())
        located = problem.located(draws.centre, draws.scale, float(draws.highest))
        if not isinstance(control, MixtureControl):
            return located, given_control(located, None)
        z, seed = ((x - draws.centre) / draws.scale).flatten(0, 1), derive_seed(run.seed, Place.AUTO_COVERED)
        law = fit_mixture(z.to(located.dtype), log_w.flatten(), seed=seed, most=self.components)
        return located, MixtureControl(located, law)

    def make_solution(
        self, problem: ControlProblem, control: Control, mapped: MappedLaw | None = None, **facts: Any
    ) -> TemperedSolution:
        return TemperedSolution(
            problem,
            control,
            particles=ParticleSettings(self.num_particles),
            tempering=TemperedSettings("states", problem.has_gradient, mixture=isinstance(control, MixtureControl)),
            mapped=mapped,
            details={"report": _report(facts["history"], control, mapped)},
            **facts,
        )


def _lost(state: Rounds) -> bool:
    """Whether rounds from the mixture have found less than the first, so that it has lost something."""
    return float(state.seen[0] - state.log_z[0]) > max(_WORSE, _WORSE_SIGMAS * float(state.seen[2:].norm()))


def _counted(state: Rounds, problem: Any) -> dict[str, int]:
    """Evaluations by what they were for."""
    own = {"rounds": int(state.spent)}
    if state.allowance.limited:
        search, estimate = int(state.sought), int(state.estimated)
        own = {"search": search, "rounds": int(state.spent) - search - estimate, "estimate": estimate}
    found = {**problem.spent, **own}
    return {**found, "total": sum(found.values())}


_KEPT = {
    GAUSSIAN: "tempering from the wide Gaussian, whose cost is the least",
    MIXTURE: "tempering from the mixture",
    IMPORTANCE: "importance sampling from the mixture",
}


def _report(history: list[dict[str, float]], kept: Any, mapped: MappedLaw | None = None) -> str:
    """What each round began with, found and cost, and what was kept: a control, with the law of particles that it only
    comes near to, or the law of draws that were made."""
    rounds = [row for row in history if "levels" in row]
    lines = []
    for i, row in enumerate(rounds):
        start = "a wide Gaussian" if i == 0 else "the mixture"
        levels = int(row["levels"])
        lines.append(
            f"round {i + 1}, from {start}: log Z {Estimate(row['log_z'], row['objective_stderr'])}, {levels} "
            f"level{'s' if levels > 1 else ''}, {row['cost']:.3g} evaluations to know log Z to one nat"
        )
    if history and "way" in history[-1]:
        last = history[-1]
        lines.append(
            f"kept: {_KEPT[int(last['way'])]}; {last['ess']:.0%} of the particles of {int(last['systems'])} systems "
            "are effective"
        )
    elif not isinstance(kept, Control):
        lines.append("kept: the particles of the last round, which ended before the estimate")
    elif isinstance(kept, MixtureControl):
        lines.append(f"kept: tempering from {mapped or kept.law!r}")
    else:
        paid = any(row["cost"] < rounds[0]["cost"] for row in rounds)
        why = "rounds from the mixture found less" if paid else "learning did not pay"
        lines.append(f"kept: tempering from the wide Gaussian; {why}")
    return "\n".join(lines)
