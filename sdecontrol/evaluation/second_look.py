"""A second look at a target: weighted paths of it that the control under question has not drawn, within a budget.

Paths of the reference where these reach the target; where they do not, particles of the reference, resampled by their
running costs; else tempered particles. For samples of a density also a search from far out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..chains.base import Chain
from ..chains.shifts import ShiftsBeside
from ..errors import NonFiniteError
from ..particles.ascent import LadderError, adapt
from ..particles.mixture_fit import fit_mixture
from ..particles.smc import ParticleSettings, Proposal, resample, run_particles
from ..particles.tempering import NoiseTarget, StateTarget
from ..paths.integrator import integrate
from ..paths.paths import Paths, sum_steps
from ..paths.rows import between_ranks
from ..problems.pilot import search
from ..problems.problem import ControlProblem
from ..problems.simulate import simulate_chain
from ..problems.simulation_options import SimulationOptions
from ..processes.laws import draw
from ..processes.modules import evaluating, modules_in, out_of_inference_mode
from ..randomness import Place, SeededNoise, derive_seed, generator_for
from .estimates import Estimate, effective_sample_size, log_mean_weight, mean_estimate, pareto_k
from .target_paths import weights_to

ESS_FLOOR = 100  # effective samples below which no weight average is trusted
HEAVY = 0.7  # Pareto k from which the mean weight and its error are not trusted
_FIRST = 4  # a part of the budget goes to see whether the reference's paths reach
_SYSTEMS = 16
_MOST_PATHS = 16384  # of the reference beside particles, whose evaluations are many more than an error asks for
_WIDTH = 1.0  # of the Gaussian that tempered particles begin with, in units of the reference's end
_HELD = 1 << 22  # numbers of paths that are held at once
_SEARCHES, _KEPT, _DRAWN = 64, 1024, 4096  # chains that search, samples beside their ends, draws of the mixture
_WIDER = 1.3  # variances of that mixture's components, so that weights of its tails stay bounded
_MOST_TEMPERED = 8192  # particles: their error is then below what is compared
_MOVES = 2  # of a level of tempered particles at most: more would take the particles


@dataclass(frozen=True)
class SecondLook:
    """Weighted paths of the target that were drawn without the control under question.

    Attributes:
        source: whose paths they are, in words.
        log_z: by them; None where they do not reach the target.
        log_w: ``(S, N)`` log weights of N paths in each of S independent systems, whose mean is Z.
        along: ``(S, N)`` log weights of the control along these paths; None where not known.
        ends: ``(S N, d)`` where these paths end, undecoded; None where the control's weights were wanted.
        reference_elbo: ``E[R]/alpha`` of the reference's paths, what no control scores; None where not known.
        why: why there is no log Z.
    """

    source: str
    log_z: Estimate | None = None
    log_w: Tensor | None = None
    along: Tensor | None = None
    ends: Tensor | None = None
    reference_elbo: Estimate | None = None
    why: str = ""


@dataclass(frozen=True)
class Ways:
    """Which looks at a target are others than the first.

    Attributes:
        reference, particles: whether the reference's own paths are, and particles of it.
        width: of the Gaussian that tempered particles of a density begin with; None: they are no other look.
    """

    reference: bool = True
    particles: bool = True
    width: float | None = _WIDTH


@torch.no_grad()
def look_again(
    problem: ControlProblem,
    chain: Chain,
    control: Any,
    n: int,
    seed: int,
    *,
    ways: Ways = Ways(),
    batch_size: int | None = None,
) -> SecondLook:
    """A second look at the target, from ``n`` paths (and their rewards) in all.

    Args:
        control: under question; None: no weights along the paths are wanted.
        ways: which looks are others than the first.
        batch_size: look at so many paths at a time (a multiple of 64), in the memory of these: the look is the same.
    """
    elbo, begun, found = None, 0, SecondLook("particles", why="there is no other way to look")
    with problem.evaluating():
        if ways.reference:
            paths = n if control is not None else min(n, _MOST_PATHS)
            begun = max(64, paths // _FIRST)
            first = _reference(problem, chain, control, begun, derive_seed(seed, Place.LOOK_FIRST), batch_size)
            elbo = mean_estimate(first[0][:, 0])
            if _reaches(_unfloored(problem, first[0][:, 0]), paths / begun):
                place = derive_seed(seed, Place.LOOK_REST)
                rest = _reference(problem, chain, control, max(64, paths - begun), place, batch_size)
                return replace(_weighed("the reference's paths", *_joined([first, rest])), reference_elbo=elbo)
            found = SecondLook("the reference's paths", why="the reference's paths do not reach the target")
        if problem.condition is not None:
            found = replace(found, why=f"{found.why}, and particles need one target, not many conditions")
        elif ways.particles and problem.running_cost_function is not None:
            place = derive_seed(seed, Place.LOOK_PARTICLES)
            found = _particles(problem, chain, control, n - begun, place, batch_size)
        elif ways.width is not None:
            place = derive_seed(seed, Place.LOOK_TEMPERED)
            found = _tempered(problem, chain, control, n - begun, place, ways.width, batch_size)
    return replace(found, reference_elbo=elbo)


def _reaches(log_w: Tensor, grows: float) -> bool:
    return pareto_k(log_w) < HEAVY and effective_sample_size(log_w) * len(log_w) * grows >= ESS_FLOOR


def _unfloored(problem: ControlProblem, log_w: Tensor) -> Tensor:
    """Log weights of the reference's paths, those of weight 0 where the log density was too low to be a reward: they
    are all equal, which is not the evenness of weights that reach a target."""
    if problem.density is None:
        return log_w
    lowest = problem.reward_function.lowest  # type: ignore[union-attr]
    return torch.where(log_w <= lowest + 1e-6 * abs(lowest), -math.inf, log_w)


def _weighed(source: str, log_w: Tensor, along: Tensor | None, ends: Tensor | None = None) -> SecondLook:
    """A look from independent systems ``(S, N)``: it has a log Z where the weights have a mean and an error."""
    each = log_w.logsumexp(1) - math.log(log_w.shape[1])
    log_z = log_mean_weight(each)
    if not log_z.stderr <= 1.0 or (len(each) >= 64 and not _reaches(each, 1.0)):
        return SecondLook(source, why=f"{source} do not reach the target")
    return SecondLook(source, log_z, log_w, along, ends)


_Drawn = tuple[Tensor, Tensor | None, Tensor | None]


def _reference(
    problem: ControlProblem, chain: Chain, control: Any, n: int, seed: int, batch_size: int | None
) -> _Drawn:
    """Log weights ``(n, 1)`` of the reference's paths, and of the control along them, or their ends where there is
    none; a part of the paths at a time."""
    numbers = (chain.steps + 1) * (chain.event_shape.numel() + math.prod(chain.noise_shape))
    size = max(64, _HELD // numbers // 64 * 64)
    parts: list[_Drawn] = []
    for index, low in enumerate(range(0, n, size)):
        parts.append(
            _part(problem, chain, control, min(size, n - low), derive_seed(seed, Place.LOOK_PART, index), batch_size)
        )
    return _joined(parts)


def _part(problem: ControlProblem, chain: Chain, control: Any, n: int, seed: int, batch_size: int | None) -> _Drawn:
    whole = (batch_size is None or batch_size >= n) and ranks.size() == 1
    noise = SeededNoise(seed, n, chain.steps, chain.noise_shape, dtype=chain.times.dtype, device=chain.times.device)
    start, condition = (None, None) if whole else (problem.draw_start(n, seed), problem.draw_condition(n, seed))

    def drawn(rows: Tensor) -> list[Tensor]:
        count, how, y = len(rows), SimulationOptions(), None if condition is None else condition[rows]
        if start is not None:
            own = noise.rows(int(rows[0]), int(rows[0]) + count).all()
            how = SimulationOptions(state=start[rows], noise=own)
        # of a law backwards the control's weights belong to other paths to the same ends
        if control is not None and chain.reverse is None:
            paths, along = _with_weights(problem, chain, control, count, seed, replace(how, condition=y))
            return [paths.log_weights(dtype=torch.float64).unsqueeze(1), along.unsqueeze(1)]
        paths = simulate_chain(problem, chain, count, None, seed=seed, keep="end", condition=y, how=how)
        found = [paths.log_weights(dtype=torch.float64).unsqueeze(1)]
        return found if control is not None else [*found, paths.end.flatten(1)]

    log_w, *beside = between_ranks(drawn, batch_size, torch.arange(n, device=problem.device))
    other = beside[0] if beside else None
    return (log_w, None, other) if control is None else (log_w, other, None)


@out_of_inference_mode()
def _with_weights(
    problem: ControlProblem, chain: Chain, control: Any, n: int, seed: int, how: SimulationOptions
) -> tuple[Paths, Tensor]:
    """Paths of the reference, and the log weights of the control along them, ``(n,)``."""
    beside = ShiftsBeside(chain, control)
    x, y = how.begin(problem, chain, n, None, seed)
    (noise,) = how.sources(chain, n, seed)
    with evaluating(modules_in(control)):
        paths = integrate(chain, x, noise, beside, condition=y, running_cost=problem.running_cost_or_none)
    return paths, _weights_of(paths.towards(problem), torch.stack(beside.found))


def _column(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.unsqueeze(1)


def _joined(parts: list[_Drawn]) -> _Drawn:
    first, along, ends = zip(*parts)
    join = lambda column: None if column[0] is None else torch.cat(column)  # noqa: E731
    return torch.cat(first), join(along), join(ends)


def _particles(
    problem: ControlProblem, chain: Chain, control: Any, n: int, seed: int, batch_size: int | None
) -> SecondLook:
    """Particles of the reference, which running costs tell apart on the way."""
    each = max(4, n // _SYSTEMS)
    proposal, settings = Proposal(beside=control), ParticleSettings(each)
    found = run_particles(problem, chain, proposal, _SYSTEMS, settings, seed, batch_size=batch_size)
    log_w = found.log_weights + found.log_z.unsqueeze(1) + math.log(each)
    along = None
    if found.beside is not None:
        along = (found.reward - found.running_cost) / problem.alpha - found.beside
    return _weighed("particles of the reference", log_w, along, found.end.flatten(0, 1).flatten(1))


def _tempered(
    problem: ControlProblem, chain: Chain, control: Any, n: int, seed: int, width: float, batch_size: int | None
) -> SecondLook:
    """Particles tempered from the reference (for a density: from a wide Gaussian) to the target, in ``n``
    evaluations."""
    source = "tempered particles"
    if problem.density is not None:
        wide = width * problem.scale.expand(problem.dim)
        target: StateTarget | NoiseTarget = StateTarget(problem.density, problem.centre, wide)
    else:
        target = NoiseTarget(problem, chain)
    target.batch_size = batch_size
    target.smooth = False  # a gradient costs as much as a particle more, and that is worth more in so few evaluations
    size = min(_MOST_TEMPERED, max(64, n // 12))
    try:
        _, found = adapt(target, size, seed, fraction=0.5, most_moves=_MOVES, most_evaluations=n)
    except LadderError:
        return SecondLook(source, why=f"{source} do not reach the target in {n} evaluations")
    except NonFiniteError as error:
        return SecondLook(source, why=f"{source} fail ({error})")
    assert found.variance is not None
    log_z = Estimate(float(found.log_z[0]), math.sqrt(found.variance))
    z, origin = found.z[0], found.origin[0]
    log_w = (found.log_weights + found.log_z.unsqueeze(1) + math.log(size)).mT  # particles as systems of their own
    along = None
    if isinstance(target, StateTarget):
        ends = target.states(z)
        if control is not None:
            along = weights_to(problem, chain, control, ends, derive_seed(seed, Place.LOOK_TEMPERED_PATHS))
    else:
        ends, *beside = between_ranks(lambda *rows: _along(problem, target, control, *rows), batch_size, z, origin)
        along = beside[0] if beside else None
    return SecondLook(source, log_z, log_w, _column(along), ends.flatten(1))


def _along(problem: ControlProblem, target: NoiseTarget, control: Any, z: Tensor, origin: Tensor) -> list[Tensor]:
    """States at the end, and the control's log weights."""
    paths = target.paths(z, origin)
    if control is None:
        return [paths.end]
    # step by step: so the control is asked for no more rows than there are paths
    shifts = torch.cat([paths.under(control, [k]).shifts for k in range(paths.first, paths.last)])
    return [paths.end, _weights_of(paths, shifts)]


def _weights_of(paths: Paths, shifts: Tensor) -> Tensor:
    """Log weights along paths of another control, by its shifts there."""
    ratios = paths.chain.log_ratio(shifts, paths.draws)
    return (paths.reward / paths.alpha + sum_steps(paths.log_target() - ratios)).double()


@torch.no_grad()
def search_beyond(problem: ControlProblem, samples: Tensor, log_w: Tensor, seed: int) -> Estimate | None:
    """log Z of a density by importance sampling from a mixture fitted to weighted samples of it ``(n, d)`` and to where
    short chains end that began far out. It knows what the samples know and what the chains found, so it can only speak
    against the samples; None where its weights have no error.

    It takes 201 evaluations of the log density for each of 64 chains (1001 without a gradient), and 4096.
    """
    assert problem.density is not None
    centre, scale = problem.centre, problem.scale.expand(problem.dim)
    with problem.evaluating():
        ends = search(problem.density, centre, scale, _SEARCHES, derive_seed(seed, Place.LOOK_SEARCH))
        some = resample(log_w.unsqueeze(0), _KEPT, "systematic", generator_for(centre.device, seed, Place.LOOK_KEPT))[0]
        known = (torch.cat((samples[some], ends)) - centre) / scale
        halves = torch.cat((torch.zeros(_KEPT) - math.log(_KEPT), torch.zeros(len(ends)) - math.log(max(1, len(ends)))))
        law = fit_mixture(known.double(), halves.to(known.device).double(), seed=derive_seed(seed, Place.LOOK_FIT))
        z = draw(law.widened(_WIDER), _DRAWN, derive_seed(seed, Place.LOOK_DRAWS))
        values = problem.density.value((centre + scale * z).to(centre)).double()
    weights = values + scale.double().log().sum() - law.widened(_WIDER).log_prob(z)
    return log_mean_weight(weights) if _reaches(weights, 1.0) else None


def search_cost(problem: ControlProblem) -> int:
    """Evaluations of the log density that :func:`search_beyond` takes."""
    return _SEARCHES * (201 if problem.has_gradient else 1001) + _DRAWN
