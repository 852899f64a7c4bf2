"""``certify``: a sampler held against the target from both sides, so that a collapse shows.

Weights ``w = exp(R/alpha) dQ0/dP^u`` of the sampler's own paths bound log Z from below, ``E_{P^u} log w <= log Z``
(ELBO); those of paths of the target bound it from above, ``log Z <= E_{Q_fine} log w`` (EUBO; Ji & Shen 1907.00824,
Blessing et al. 2406.07423). A sampler that sits on some of the modes has excellent weights of its own, a log Z^ that
lacks the logarithm of what it misses (log K on one of K equal modes), and only the second side sees it.

Where there are no exact draws of the target, tempered particles stand for them, and are named as such.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..particles.ascent import adapt
from ..particles.resolution import resolution_problems
from ..particles.smc import resample
from ..particles.tempering import StateTarget, run_tempered
from ..randomness import Place, derive_seed, fresh_seed, generator_for
from ..tensors import check_count
from .estimates import (
    Estimate,
    as_plain,
    bridge_log_z,
    effective_sample_size,
    jackknife,
    log_mean_weight,
    mean_estimate,
)
from .evaluate import log_weights
from .solution import Solution
from .target_paths import bridged, run_backwards, weights_to
from .tempered_solution import TemperedSettings, tempered_target

_PARTICLES = 4096
_FEW = 0.1  # forward ESS, relative to the reverse one, below which the sampler misses a part of the target
_BEYOND = 4.0  # standard errors between two estimates of log Z
_LEAST = 0.05  # nats between them that are worth an alarm
_MISSED = 0.25  # of its share in the target, below which a mode counts as missed


@dataclass(frozen=True)
class Certificate:
    """What :func:`certify` returns; prints as a table.

    Attributes:
        elbo, eubo: bounds of log Z from paths of the sampler and of the target.
        log_z: by importance weights of the sampler's paths.
        log_z_two_sided: by the bridge estimate from both (Meng & Wong 1996; the acceptance ratio method of Bennett
            1976).
        reverse_ess: ``E_P[w]^2 / E_P[w^2]`` from the sampler's paths; blind to what they never visit.
        forward_ess: the same number, ``Z / E_{Q_fine}[w]``, from paths of the target.
        coverage: share of each given mode among samples of the sampler, ``(modes,)``, or None.
        alarms: what is wrong, in words; empty where nothing is.
        source: whose paths the target's are: "exact samples" or "tempered particles".
        n: paths of each side.
    """

    elbo: Estimate
    eubo: Estimate
    log_z: Estimate
    log_z_two_sided: Estimate
    reverse_ess: Estimate
    forward_ess: Estimate
    coverage: Tensor | None
    alarms: tuple[str, ...]
    source: str
    n: int

    @property
    def collapsed(self) -> bool:
        """Whether an alarm was raised."""
        return bool(self.alarms)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {**as_plain(self), "alarms": list(self.alarms), "collapsed": self.collapsed}

    def __str__(self) -> str:
        rows = [
            ("ELBO", self.elbo, "below log Z, from the sampler's paths"),
            ("EUBO", self.eubo, f"above log Z, from {self.source}"),
            ("log Z", self.log_z, "by importance weights"),
            ("log Z", self.log_z_two_sided, "from both sides"),
            ("reverse ESS", self.reverse_ess, "from the sampler's paths"),
            ("forward ESS", self.forward_ess, f"from {self.source}"),
        ]
        width = max(len(str(r[1])) for r in rows)
        lines = [f"{name:<13} {value!s:<{width}}  {what}" for name, value, what in rows]
        if self.coverage is not None:
            hit = int((self.coverage > 0).sum())
            lines.append(f"{'modes':<13} {f'{hit} of {len(self.coverage)}':<{width}}  visited")
        return "\n".join(
            [*lines, *(f"ALARM: {alarm}" for alarm in self.alarms)] if self.alarms else [*lines, "no alarm"]
        )


def certify(
    solution: Solution,
    samples: Tensor | None = None,
    *,
    modes: Tensor | None = None,
    n: int = 4096,
    seed: int | None = None,
) -> Certificate:
    """Bounds of log Z from both sides, both effective sample sizes, and an alarm where they say that a part of the
    target is missed.

    Args:
        samples: independent draws of the target, ``(m, *event)``, where there are any (linear references without
            running cost: Gibbs problems among them, whose samples are in the user's own parameters). None: tempered
            particles stand for them, whose own errors are then part of all that is said.
        modes: ``(modes, *event)``; the share of samples nearest to each is reported, and one that is visited far too
            rarely raises the alarm.
        n: paths of the sampler, and particles.

    Raises:
        ValueError: samples of another shape, or a problem for which neither samples nor particles can be used.
    """
    problem, seed = solution.problem, fresh_seed(seed)
    check_count("n", n, 64)
    if problem.condition is not None:
        raise ValueError("condition: certify one target at a time; make a problem with the condition fixed.")
    samples = None if samples is None else problem.coordinates_of(samples)
    modes = None if modes is None else problem.coordinates_of(modes)
    paths = solution.simulate(n, seed, keep="end")
    with torch.no_grad(), problem.evaluating():
        reverse, ends = log_weights(problem, paths).double(), paths.samples
        if samples is not None:
            forward, truth = _of_samples(solution, samples, seed), samples
        else:
            forward, truth = _of_particles(solution, n, derive_seed(seed, Place.CERTIFICATE_PARTICLES))
    if not bool(torch.isfinite(forward).all()):
        raise NonFiniteError(
            "the target's paths have weights that are not finite: are samples where the log density is finite?",
            what="weights",
        )
    log_z, both = log_mean_weight(reverse), bridge_log_z(reverse, forward)
    found = Certificate(
        elbo=mean_estimate(reverse),
        eubo=mean_estimate(forward),
        log_z=log_z,
        log_z_two_sided=both,
        reverse_ess=Estimate(effective_sample_size(reverse)),
        forward_ess=_forward_ess(reverse, forward),
        coverage=None if modes is None else _shares(ends, modes),
        alarms=(),
        source="tempered particles" if samples is None else "exact samples",
        n=n,
    )
    # exact samples are what they are; particles may not be what they stand for
    unresolved = tuple(resolution_problems(problem, truth)) if samples is None else ()
    return replace(found, alarms=unresolved + _alarms(found, None if modes is None else _shares(truth, modes)))


def _forward_ess(reverse: Tensor, forward: Tensor) -> Estimate:
    """``Z / E_{Q_fine}[w]``, Z from both sides, with the error of both together: Z and the mean come from
    the same paths."""

    def of(a: Tensor, b: Tensor) -> float:
        return math.exp(min(0.0, bridge_log_z(a, b).value - log_mean_weight(b).value))

    return jackknife(of, reverse, forward)


def _alarms(found: Certificate, expected: Tensor | None) -> tuple[str, ...]:
    out = []
    lacking = found.log_z_two_sided - found.log_z
    if lacking.value > max(_LEAST, _BEYOND * lacking.stderr):
        out.append(
            f"the sampler's own log Z is {lacking.value:.3g} below the one from both sides: it misses about "
            f"{1 - math.exp(-lacking.value):.0%} of the target, whatever its reverse ESS says."
        )
    if _below(found.forward_ess, _FEW * found.reverse_ess.value):
        out.append(
            f"forward ESS {found.forward_ess.value:.2g} against reverse ESS {found.reverse_ess.value:.2g}: paths of "
            f"{found.source} have weights that the sampler's never show."
        )
    if found.coverage is not None and expected is not None:
        missed = found.coverage < _MISSED * expected - 4 * (expected / found.n).sqrt()
        if bool(missed.any()):
            out.append(
                f"{int(missed.sum())} of {len(missed)} modes are (nearly) missed, with "
                f"{float(expected[missed].sum()):.0%} of the target."
            )
    return tuple(out)


def _below(share: Estimate, level: float) -> bool:
    """Whether a positive number is, beyond the error of its logarithm: one draw of the target far out may make all of
    it."""
    return share.value < level * math.exp(-_BEYOND * share.stderr / share.value) if share.value > 0 else level > 0


def _shares(x: Tensor, modes: Tensor) -> Tensor:
    nearest = torch.cdist(x.flatten(1).to(modes), modes.flatten(1)).argmin(1)
    return torch.bincount(nearest, minlength=len(modes)).double() / len(x)


def _of_samples(solution: Solution, samples: Tensor, seed: int) -> Tensor:
    """Log weights of paths of the target that end in these draws."""
    problem, chain = solution.problem, solution.chain
    if samples.ndim < 2 or samples.shape[1:] != problem.event_shape or len(samples) < 64:
        raise ValueError(
            f"samples must be at least 64 draws of the target, (m, {', '.join(map(str, problem.event_shape))}); got "
            f"{tuple(samples.shape)}."
        )
    if not bridged(problem):
        raise ValueError(
            "samples: paths to given ends need a Gaussian or point start and no running cost; leave samples out."
        )
    return weights_to(problem, chain, solution.control, samples, derive_seed(seed, Place.CERTIFICATE_SAMPLES))


def _of_particles(solution: Solution, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Log weights of tempered particles of the target, in the space of the reference's noises, and their decoded
    ends."""
    problem, chain = solution.problem, solution.chain
    ends_alone = chain.reverse is not None  # paths depend on the control there, and ends do not
    settings = TemperedSettings("states" if ends_alone else "noises", gradient=ends_alone)
    target = tempered_target(problem, chain, None, settings)
    ladder, _ = adapt(target, _PARTICLES, seed)
    found = run_tempered(target, ladder, max(1, -(-n // _PARTICLES)), _PARTICLES, seed)
    log_w = (found.log_weights + found.log_z.unsqueeze(1)).flatten()
    generator = generator_for(chain.times.device, seed, Place.CERTIFICATE_ENDS)
    rows = resample(log_w.unsqueeze(0), n, "systematic", generator)[0]
    if isinstance(target, StateTarget):
        ends = target.states(found.z.flatten(0, 1)[rows])
        place = derive_seed(seed, Place.CERTIFICATE_PARTICLES_BACKWARDS)
        return run_backwards(problem, chain, solution.control, ends, place), ends
    paths = target.paths(found.z.flatten(0, 1)[rows], found.origin.flatten(0, 1)[rows])
    total = (problem.reward(paths.samples) - paths.running_cost) / problem.alpha
    return (total - paths.log_ratio(solution.control)).double(), paths.samples
