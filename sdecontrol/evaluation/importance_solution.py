"""``ImportanceSolution``: a solution that is weighted draws, made within a number of evaluations."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..controls.saved import Context, Saved
from ..files.contents import part_of, with_part
from ..particles.adaptive_importance import SYSTEMS
from ..particles.mixture_fit import fit_mixture
from ..particles.smc import Particles, resample
from ..problems.pilot import spread_of
from ..randomness import Place, derive_seed, fresh_seed, generator_for
from ..shapes import PerPath
from ..tensors import check_count
from .estimates import Estimate, log_mean_weight, pareto_k
from .evaluate import Evaluation
from .particle_solution import ParticleSolution
from .second_look import HEAVY, Ways
from .solution import SOLUTIONS
from .verdict import SIGMAS, UNRELIABLE

_LOCATED = 4096  # draws that say where the reference is to be
_HIDDEN, _MOST_K = 0.56, 0.9  # of :func:`hidden`
_MARGIN = 0.02  # nats within which two estimates need not agree


@dataclass(frozen=True)
class WeightedDraws:
    """Draws of a density with what is known of each.

    Attributes:
        x: ``(M, N, d)`` coordinates, dealt into M systems. log_rho: ``(M, N)`` the log density there. log_w: ``(M, N)``
            log weights, whose mean exponential is Z.
        other: log Z and its error by all draws but these, ``(2,)``; nan where there are no others.
        unit: 0-d, so many draws in a row know nothing of any others: the number of particles of a system, or less.
        estimated: 0-d, 1 where they are independent draws of a law that was fixed before; 0 where they have chosen it.
        centre, scale: ``(d,)`` of the reference, made to cover them. highest: 0-d, the largest log density met.
    """

    x: Tensor
    log_rho: Tensor
    log_w: Tensor
    other: Tensor
    unit: Tensor
    estimated: Tensor
    centre: Tensor
    scale: Tensor
    highest: Tensor


@SOLUTIONS.register("importance")
class ImportanceSolution(ParticleSolution):
    """A :class:`ParticleSolution` whose draws have been made: nothing that is asked of it evaluates the density again,
    but ``evaluate(confirm=n)``, which takes n evaluations for a second look, and paths of its control.

    More samples than are effective among the draws are copies of them.

    Attributes:
        draws: of the last law, independent, in 16 systems.
    """

    parts = ("twist", "draws")

    def __init__(self, *args: Any, draws: WeightedDraws, **facts: Any) -> None:
        super().__init__(*args, **facts)
        self.draws = draws

    def run(
        self, systems: int = SYSTEMS, seed: int | None = None, *, condition: Any = None, batch_size: int | None = None
    ) -> Particles:
        """The draws, whatever is asked for."""
        d, nothing = self.draws, torch.zeros_like(self.draws.log_w)
        reward = self.problem.reward_function.of(d.log_rho.flatten().to(d.x), d.x.flatten(0, 1))  # type: ignore[union-attr]
        return Particles(
            end=d.x,
            log_weights=d.log_w.log_softmax(1),
            log_z=d.log_w.logsumexp(1) - math.log(d.log_w.shape[1]),
            reward=reward.double().reshape(d.log_w.shape),
            running_cost=nothing,
            log_ratio=nothing,
            condition=None,
            ess=nothing.new_zeros(0),
            resampled=nothing.new_zeros(0),
        )

    def weighted_sample(
        self,
        n: int,
        seed: int | None = None,
        *,
        condition: Any = None,
        batch_size: int | None = None,
        raw: bool = False,
    ) -> tuple[Any, PerPath]:
        """n of the draws with their log weights, none twice before all are taken: the mean of the exponentials over all
        is Z without bias."""
        check_count("n", n)
        x, log_w = self.draws.x.flatten(0, 1), self.draws.log_w.flatten()
        generator = generator_for(x.device, fresh_seed(seed), Place.IMPORTANCE_ORDER)
        turns = [torch.randperm(len(x), generator=generator, device=x.device) for _ in range(-(-n // len(x)))]
        index = torch.cat(turns)[:n]
        return x[index] if raw else self.problem.as_stated(x[index]), log_w[index].to(x)

    def evaluate(
        self, n: int = 4096, seed: int | None = None, *, confirm: bool | int = True, batch_size: int | None = None
    ) -> Evaluation:
        """As :meth:`ParticleSolution.evaluate`, of the draws there are, whatever n, and without an evaluation of the
        density.

        Args:
            confirm: a number: so many evaluations for a second estimate of log Z by tempered particles. True or False:
                none, and the verdict is "unconfirmed" at best.
        """
        more = 0 if isinstance(confirm, bool) else confirm
        found = super().evaluate(n, seed, confirm=more or False, batch_size=batch_size)
        return replace(found, pareto_k=self._tail, n=self.draws.log_w.numel())

    def _log_z(self, found: Particles) -> Estimate:
        """With its error over all independent groups of draws, which 16 systems of them would know to a fifth only;
        larger where the tail of the weights is so heavy that it hides a part of their variance (:func:`hidden`)."""
        unit = int(self.draws.unit)
        groups = self.draws.log_w.unflatten(1, (-1, unit)).logsumexp(2) - math.log(unit)
        plain = log_mean_weight(groups.flatten())
        return Estimate(plain.value, plain.stderr * hidden(self._tail))

    @functools.cached_property
    def _tail(self) -> float:
        return pareto_k(self.draws.log_w.flatten())

    def _verdict(self, found: Particles, log_z: Estimate, *rest: Any) -> tuple[str, str]:
        verdict, why = super()._verdict(found, log_z, *rest)
        if not bool(self.draws.estimated):
            return UNRELIABLE, "it ended before the estimate began: these draws have chosen the law that they come from"
        if self._tail >= HEAVY:
            return UNRELIABLE, f"heavy-tailed weights (Pareto k = {self._tail:.2f}, must be < {HEAVY})"
        other = Estimate(*self.draws.other.tolist())
        apart = other - log_z
        if math.isfinite(apart.stderr) and apart.value > SIGMAS * apart.stderr + _MARGIN:
            return (
                UNRELIABLE,
                f"draws of the search find more: log Z = {other}, so that part of the target is missing here",
            )
        return verdict, why

    def _other_ways(self) -> Ways:
        return Ways(False, False, 2.0)

    # ---------------------------------------------------------------- files

    def _tensors(self) -> dict[str, Tensor]:
        return super()._tensors() | with_part("draws", vars(self.draws))

    @classmethod
    def problem_of(cls, problem: Any, tensors: dict[str, Tensor]) -> Any:
        own = part_of(tensors, "draws")
        return problem.located(own["centre"], own["scale"], float(own["highest"]))

    @classmethod
    def from_saved(cls, saved: Saved, context: Context, tensors: dict[str, Tensor]) -> dict[str, Any]:
        draws = Saved(part_of(tensors, "draws"), f"{saved.where}'s draws").settings(WeightedDraws)
        return {**super().from_saved(saved, context, tensors), "draws": draws}


def hidden(k: float) -> float:
    """How many times as large as its stated error the error of the logarithm of a mean is, in the root mean square, for
    weights of a Pareto tail of shape k: by simulation of generalised Pareto weights 1.2, 1.4, 1.9, 2.8 and 4.7 at k =
    0.5, 0.6, 0.7, 0.8 and 0.9, for 100 as for 10 000 of them."""
    return max(1.0, _HIDDEN / (1 - min(k, _MOST_K))) if math.isfinite(k) else 1.0


def located_draws(
    problem: Any,
    systems: tuple[Tensor, Tensor, Tensor],
    seed: int,
    *,
    components: int,
    highest: Tensor,
    other: Tensor | None = None,
    estimated: bool = True,
    unit: int | None = None,
) -> tuple[WeightedDraws, Any]:
    """Draws in M systems, with centre and scale of a reference that covers them, and a mixture fitted to
    them in its coordinates.

    Args:
        systems: x ``(M, N, d)``, their log densities and log weights ``(M, N)``. highest: the largest log density met.
            other, estimated, unit: of :class:`WeightedDraws`; unit None: systems.

    Raises:
        ValueError: too few of them have a weight above 0 for a mixture.
    """
    x, log_rho, log_w = systems
    flat, weights = x.double().flatten(0, 1), log_w.flatten()
    generator = generator_for(x.device, seed, Place.IMPORTANCE_LOCATED)
    typical = flat[resample(weights.unsqueeze(0), _LOCATED, "systematic", generator)[0]]
    centre, scale = spread_of(typical[None], typical.mean(0), False)
    scale = scale.expand(centre.shape).clamp(min=1e-12 * (1 + float(centre.abs().max())))
    z, place = ((flat - centre) / scale).to(problem.dtype), derive_seed(seed, Place.IMPORTANCE_LAW)
    law = fit_mixture(z, weights, seed=place, most=components)
    nothing = log_w.new_full((2,), math.nan)
    whole = torch.tensor(log_w.shape[1] if unit is None else unit, device=x.device)
    facts = (nothing if other is None else other, whole, log_w.new_tensor(float(estimated)))
    where = (centre.to(problem.dtype), scale.to(problem.dtype), highest)
    return WeightedDraws(x.to(problem.dtype), log_rho, log_w, *facts, *where), law


def other_estimate(log_w: Tensor) -> Tensor:
    """log Z by weights ``(n,)`` and its error, ``(2,)``; nan where their tail is too heavy for one."""
    if len(log_w) < 100 or not bool((log_w > -math.inf).any()) or not pareto_k(log_w) < HEAVY:
        return log_w.new_full((2,), math.nan)
    found = log_mean_weight(log_w)
    return log_w.new_tensor([found.value, found.stderr])
