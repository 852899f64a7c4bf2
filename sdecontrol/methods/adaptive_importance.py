"""``AdaptiveImportance``: a density in few evaluations, by importance sampling from mixtures fitted to all of them."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..controls.mixture import MixtureControl
from ..errors import NonFiniteError
from ..evaluation.importance_solution import ImportanceSolution, WeightedDraws, located_draws, other_estimate
from ..evaluation.particle_solution import ParticleSettings
from ..particles.adaptive_importance import SYSTEMS, TURN, AdaptiveSampler, Values, start_law
from ..problems.gibbs import bad_values
from ..problems.problem import ControlProblem
from ..tensors import check_count
from .base import Method, Run, register

_LEAST, _LEAST_EACH = 500, 100  # evaluations that it needs, and for each dimension
_AT_ONCE = 16  # points for each worker between which it may be interrupted


class _PriorLaw:
    """The priors, in the coordinates of the density."""

    def __init__(self, problem: Any) -> None:
        self.parameters = problem.parameters

    def log_prob(self, x: Tensor) -> Tensor:
        values, ladj, inside = self.parameters.constrained(x)
        return torch.where(inside, self.parameters.log_prior(values) + ladj, -math.inf)


class _State(nn.Module):
    """The values that were asked for; the rest is a function of them."""

    values: Tensor
    count: Tensor

    def __init__(self, total: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(total, dtype=torch.float64, device=device))
        self.register_buffer("count", torch.zeros((), dtype=torch.long, device=device))
        self.sampler: AdaptiveSampler | None = None

    def at(self, batches: int, method: "AdaptiveImportance", run: Run) -> AdaptiveSampler:
        """The run after so many batches, gone through again where it is not there."""
        if self.sampler is None:
            self.sampler = method.sampler(self, run)
        while self.sampler.batch < batches:
            self.sampler.step()
        return self.sampler


@register
@dataclass(frozen=True)
class AdaptiveImportance(Method):
    """For densities whose values are dear: importance sampling from mixtures of Gaussians, fitted to every value ever
    asked for (``particles/adaptive_importance.py``).

    No gradient, no pilot run, and no draw far outside of what has been seen. It begins with the priors where all
    parameters have one, with the reference's end where a scale was given, and with a standard normal law of the
    coordinates where nothing is known. Half of the evaluations are independent draws of the last law, whose weights
    give log Z without bias and their own error. What comes of it is an :class:`ImportanceSolution`: samples,
    evaluation and figures cost no evaluation more.

    Each iteration is a batch; interrupted (Ctrl-C), or at the end of a budget of time, it gives what there is. A
    resumed run has the values of its checkpoint and ends with the same numbers.

    Args:
        evaluations: of the log density, all together: what the problem has spent so far is among them.
        components: of a mixture at most.

    Raises:
        ValueError: no Gibbs problem, or one with conditions; too few evaluations, with the number that it needs.
    """

    evaluations: int = 20_000
    components: int = 16

    default_iterations: ClassVar[int] = 100_000
    steady: ClassVar[bool] = True
    anytime: ClassVar[bool] = True
    takes_control: ClassVar[bool] = False
    estimates: ClassVar[str | None] = "log_z"

    def __post_init__(self) -> None:
        check_count("evaluations", self.evaluations)
        check_count("components", self.components)

    def prepare(self, problem: ControlProblem) -> tuple[Method, ControlProblem]:
        """The problem with a reference that stands for the one to be found; nothing is evaluated."""
        own: Any = problem
        if problem.density is None:
            raise ValueError(
                f"{self.name} is for gibbs_problem; sc.recommend(problem) says which method suits another."
            )
        if problem.condition is not None:
            raise ValueError(f"{self.name} samples one density; make a problem with the condition fixed.")
        least = max(_LEAST, _LEAST_EACH * own.dim) + sum(own.spent.values())
        if self.evaluations < least:
            raise ValueError(
                f"evaluations={self.evaluations} are too few: {self.name} needs {least} in {own.dim} dimensions "
                f"({sum(own.spent.values())} are spent already)."
            )
        if own.settled:
            return self, problem
        centre, scale = own.statement.centre, own.statement.scale
        dtype = torch.float64 if own.statement.finer else centre.dtype
        guessed = scale is None
        scale = torch.ones_like(centre) if scale is None else scale
        return self, own.located(centre.to(dtype), scale.to(dtype), 0.0, guessed)

    def setup(self, run: Run) -> nn.Module:
        problem: Any = run.problem
        return _State(self.evaluations - sum(problem.spent.values()), problem.device)

    def sampler(self, state: _State, run: Run) -> AdaptiveSampler:
        """The run before its first batch."""
        problem: Any = run.problem
        density, user = problem.density, problem.density.user

        def ask(x: Tensor) -> Tensor:
            with problem.evaluating():
                found = density.value(x.to(problem.dtype)).double()
            bad = int((found.isnan() | (found == math.inf)).sum())
            if bad:
                raise bad_values(bad, x)
            return found

        workers = user.pool.workers if isinstance(user.pool.workers, int) else 1
        rows = len(state.values) if user.vectorised else _AT_ONCE * workers
        values = Values(ask, state.values, state.count, rows)
        centre, scale = problem.centre.double(), problem.scale.double()
        known = not problem.statement.guessed
        if problem.parameters.complete_prior and not known:
            start: Any = _PriorLaw(problem), lambda n, seed: problem.parameters.draw_prior(n, seed, centre)
        else:
            start = start_law(centre, 2 * scale if known else scale)
        guess = not known and not problem.parameters.complete_prior
        return AdaptiveSampler(start, values, len(state.values), run.seed, self.components, guess)

    @torch.no_grad()
    def step(self, state: Any, run: Run) -> dict[str, float]:
        sampler = state.at(run.iteration, self, run)
        sampler.step()
        _, log_w, _ = sampler.weighted()
        top = log_w.max()
        w = (log_w - top).exp() if top > -math.inf else torch.zeros_like(log_w)
        mean = float(w.mean())
        log_z = float(top) + math.log(mean) if mean > 0 else -math.inf
        error = float(w.std()) / mean / math.sqrt(len(w)) if mean > 0 and len(w) > 1 else math.nan
        facts = {"log_z": log_z, "log_z_stderr": error, "objective": log_z, "objective_stderr": error}
        stage = float(("explore", "search", "refine", "estimate").index(sampler.stage))
        return {**facts, "evaluations": float(state.count), "beta": sampler.beta, "stage": stage, "ess": sampler.even}

    def finished(self, state: Any, run: Run) -> bool:
        return int(state.count) >= len(state.values) and (state.sampler is None or state.sampler.done)

    @torch.no_grad()
    def solution(self, state: Any, run: Run, problem: ControlProblem, **facts: Any) -> ImportanceSolution:
        sampler = state.at(len(facts["history"]), self, run)
        draws, law = self._draws(sampler, problem, run.seed)
        located = problem.located(draws.centre, draws.scale, float(draws.highest))  # type: ignore[attr-defined]
        spent = {**located.spent, "search": len(sampler.x), "estimate": int(state.count) - len(sampler.x)}
        details = {"evaluations": {**spent, "total": sum(spent.values())}, "report": _report(sampler, spent)}
        control = MixtureControl(located, law)
        size = draws.log_w.shape[1]
        return ImportanceSolution(
            located, control, particles=ParticleSettings(size), draws=draws, details=details, **facts
        )

    def _draws(self, sampler: AdaptiveSampler, problem: ControlProblem, seed: int) -> tuple[WeightedDraws, Any]:
        """The draws, dealt into systems, and a mixture of the standardised target."""
        x, log_w, final = sampler.weighted()
        if not bool((log_w > -math.inf).any()):
            raise NonFiniteError(
                f"log_density is -inf at all {len(log_w)} points tried. Pass centre= (a point where the density is "
                "positive) and scale=, or priors.",
                what="log_density",
                rows=len(log_w),
            )
        log_rho = sampler.values.known[len(sampler.x) :][: len(x)] if final else sampler.log_rho
        turn = TURN if final else 1  # each system has whole turns of the law and its wide parts
        kept = len(x) // (SYSTEMS * turn) * SYSTEMS * turn
        deal = lambda v: v[:kept].unflatten(0, (-1, SYSTEMS, turn)).transpose(0, 1).flatten(1, 2)  # noqa: E731
        before = sampler.log_rho - sampler.level + math.log(max(1, len(sampler.x)))
        return located_draws(
            problem,
            (deal(x), deal(log_rho), deal(log_w)),
            seed,
            components=self.components,
            highest=sampler.values.known[: int(sampler.values.count)].max(),
            other=other_estimate(before) if final else None,
            estimated=final,
            unit=TURN if final else None,
        )


def _report(sampler: AdaptiveSampler, spent: dict[str, int]) -> str:
    told = ", ".join(f"{n} {name}" for name, n in spent.items() if n)
    return (
        f"{sampler.batch} batches, ended in {sampler.stage}; evaluations: {told}\n"
        f"kept: importance sampling from {sampler.law!r}, {sampler.even:.0%} of whose draws are effective"
    )
