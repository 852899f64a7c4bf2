"""The pilot run of a Gibbs problem: where a target is and how wide, from nothing but its log density.

1. *Scan.* Standard normal draws are scaled to ``s = 2^-20 .. 2^20`` around the centre, and the lower bound of log Z by
   ``N(centre, s^2 I)``, ``E[log rho] + d log s`` (restricted to where rho > 0, with the log of that probability), picks
   a scale. A target whose bound still rises at the widest scale is improper: for a proper one it falls at last.
2. *Chains.* 128 chains start at once to 64 times that scale and run 200 steps of the Barker proposal (Livingstone &
   Zanella 1908.11812), each with a step size of its own; without a gradient, 1000 steps of random-walk Metropolis. The
   Barker proposal never overshoots, however steep the target, and its steps grow geometrically while a chain is far
   out, so that scales from 1e-3 to 1e3 and means far away are found in the same number of steps. The chains start
   overdispersed and are not run
   to convergence: what bias they have is towards a wide scale.
3. *Spread.* Standard deviation of the chains' second half, times 1.25: without the chains whose log density is far
   below the others' (not arrived), and each coordinate winsorised at eight half-widths of its central 68 per cent or
   the width of its central 96 (tails without a variance). One number where the coordinates agree within a factor 1.5,
   or within four standard errors between chains each, else one for each. Coordinates of the centre that differ from
   the first guess by less than a quarter of the spread, or four standard errors, keep it (symmetry).
4. *Rays.* From four of the chains' ends along the axes, the directions in which the scores vary least (where a density
   is constant along a direction, as energies of particles under translation, no score has a part in it) and some random
   lines: a proper density is integrable along almost every line, so along none does it fall slower than 1/distance at
   all four. Where it does not fall along one, but does further out, the chains began in a narrow place (the neck of a
   funnel) and have not left it: they are run again from as far out as that.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ImproperTarget
from ..randomness import Place, derive_seed, generator_for
from .density import LogDensity

_EXPONENTS, _FURTHER = range(-20, 21), range(-60, 61)
_DRAWS, _MORE_DRAWS = 64, 2048  # per scale of the scan; the second where none of the first has density
_CHAINS, _STEPS, _STEPS_WITHOUT_GRADIENT = 128, 200, 1000
_DOUBLINGS = 6.0  # chains start at the scan's scale times 2^U(0, 6)
_KEPT = 8  # states of each chain's second half that enter the spread
_WIDER = 1.25
_TAIL = 8.0  # half-widths of the central 68 per cent
_ALIKE = 1.5
_ERRORS = 4.0  # standard errors between chains within which a difference is none
_LATE = 3.0  # upper half-widths (plus as many units) below the chains' median log density: not arrived, left out
_RUNS = 3  # of the chains at most
_RAY_ENDS, _RAY_STARTS, _RAY_AXES, _RAY_LINES, _RAY_LEVEL = (1e2, 1e4), 4, 64, 16, 4
_RAY_FURTHER = tuple(4.0**k for k in range(1, 9))  # times the outer end
_LEAST_SCALE, _MOST_SCALE = 4e-6, 1e7


@dataclass(frozen=True)
class Pilot:
    """What the pilot run found, and what it cost.

    Attributes:
        centre: ``(d,)``. scale: 0-d or ``(d,)``.
        highest: the largest log density met.
        values, gradients: evaluations of the log density (rows), and how many of them with a gradient.
        acceptance: of the chains' moves in their second half.
        roughness: root mean square of a score's entry there, in units of 1/scale (1.25 for a Gaussian); nan without a
            gradient.
    """

    centre: Tensor
    scale: Tensor
    highest: float
    values: int
    gradients: int
    acceptance: float
    roughness: float


def run_pilot(
    density: LogDensity, guess: Tensor, keep_centre: bool, conditions: Callable[[int, int], Any], seed: int
) -> Pilot:
    """Run the pilot.

    Args:
        guess: first guess of the centre, ``(d,)``; kept as it is where ``keep_centre``.
        conditions: ``(n, seed) -> n`` conditions, or None.

    Raises:
        ImproperTarget: the density does not fall far out. ValueError: it vanishes wherever the scan looked.
    """
    scan_scale, known, values = _scan(density, guess, conditions, seed)
    for again in range(_RUNS):
        run_seed = derive_seed(seed, Place.PILOT_AGAIN, again) if again else seed
        states, scores, ends, y, acceptance = _chains(density, guess, scan_scale, (known, values), conditions, run_seed)
        centre, scale = spread_of(states, guess, keep_centre)
        _check_spread(scale, scan_scale)
        high = ends[1].argsort(descending=True)[: _CHAINS // 2]  # the others may not have arrived
        rows = high[:: len(high) // _RAY_STARTS]
        rows = rows[ends[1][rows].isfinite()]
        further = check_rays(density, ends[0][rows], scale, None if y is None else y[rows], seed, scores)
        if further is None:
            break
        scan_scale = further / 2**_DOUBLINGS
    highest = max(float(values.max()), float(ends[1].max()))
    steep = float((scores.double() * scale.double()).square().mean().sqrt()) if density.differentiable else math.nan
    return Pilot(
        centre=centre,
        scale=scale,
        highest=highest,
        values=density.values,
        gradients=density.gradients,
        acceptance=acceptance,
        roughness=steep,
    )


def _check_spread(scale: Tensor, scan_scale: float) -> None:
    """Raise where chains have ended in a point, or run away."""
    if float(scale.max()) < _LEAST_SCALE * min(1.0, scan_scale):
        raise ImproperTarget(
            f"log_density is concentrated at a scale of {float(scale.max()):.1e}: it is unbounded (the integral looks "
            "infinite at a point), or too narrow. Rescale x, or pass centre= and scale=."
        )
    if not float(scale.max()) < _MOST_SCALE * max(1.0, scan_scale):
        raise ImproperTarget(
            f"log_density does not hold the pilot's chains: they run away (to {float(scale.max()):.1e}), so its "
            "integral looks infinite. Check its sign (a log density, not an energy), or add a prior; if it is proper "
            "and that wide, rescale x or pass centre= and scale=."
        )


def search(density: LogDensity, centre: Tensor, scale: Tensor, n: int, seed: int) -> Tensor:
    """Where n of the pilot's chains end, ``(m, d)``, ``m <= n``, started at once from half of the reference's scale to
    eight times it: modes near the centre are found from near, those around it from far. No draws of the target: each
    mode has the share of its basin, not its own.
    """
    generator = generator_for(centre.device, seed, Place.SEARCH)
    u = torch.rand(n, 1, generator=generator, dtype=centre.dtype, device=centre.device)
    start = float(scale.max()) * 2 ** (4 * u - 1)
    inside = centre.unsqueeze(0)
    known = inside, density.value(inside)
    _, _, (x, value), _, _ = _chains(density, centre, 1.0, known, lambda n, seed: None, seed, start=start)
    return x[_arrived(value)]


def _arrived(value: Tensor) -> Tensor:
    """Which chains, by their log densities ``(n,)``, have arrived: neither far below the others nor without any density
    yet."""
    found = value.isfinite()
    if bool(found.any()):
        low, high = torch.quantile(value[found], value.new_tensor([0.5, 0.84])).tolist()
        found = value > low - _LATE * (high - low) - _LATE
    return found


def _finite(values: Tensor) -> Tensor:
    """NaN and +inf as -inf: nothing to go by."""
    return torch.nan_to_num(values, nan=-math.inf, posinf=-math.inf, neginf=-math.inf)


def _scan(
    density: LogDensity, guess: Tensor, conditions: Callable[[int, int], Any], seed: int
) -> tuple[float, Tensor, Tensor]:
    """The best scale, and points near it with their values, all finite."""
    exponents = _EXPONENTS
    for count in (_DRAWS, _MORE_DRAWS):
        generator = generator_for(guess.device, seed, Place.PILOT_SCAN, count)
        z = torch.randn(count, guess.numel(), generator=generator, dtype=guess.dtype, device=guess.device)
        y = conditions(count, derive_seed(seed, Place.PILOT_SCAN_CONDITION, count))
        scales, values, bound, rounding = _bounds(density, guess, z, y, exponents)
        if bool(values.isfinite().any()):
            break
    else:
        raise ValueError(
            f"log_density is -inf (or not finite) at all {len(exponents) * _MORE_DRAWS} points tried, at scales 1e-6 "
            f"to 1e6 around {'the centre' if bool(guess.any()) else '0'}. Pass centre= (a point where the density is "
            "positive) and scale= (its width)."
        )
    best = int(bound.argmax())
    if not 1 < best < len(scales) - 2:  # no unit is the natural one: far wider, and far narrower
        scales, values, bound, rounding = _bounds(density, guess, z, y, _FURTHER)
        best = int(bound.argmax())
    # far from a narrow target all bounds are equal to rounding: then nothing rises, and chains start wide
    if best >= len(scales) - 2 and float(bound[best] - bound[:-2].max()) > rounding:
        raise ImproperTarget(
            "log_density does not fall far out: the integral of exp(log_density) looks infinite (the lower bound of "
            f"log Z still rises at scale {float(scales[-1]):.0e}), so there is no density to sample. Check its sign (a "
            "log density, not an energy), or add a prior; if it is proper, pass centre= and scale=."
        )
    if best <= 1 and float(bound[best] - bound[2:].max()) > rounding:
        raise ImproperTarget(
            "log_density is unbounded at the centre: the integral of exp(log_density) looks infinite (the lower bound "
            f"of log Z still rises at scale {float(scales[0]):.0e}). Bound it there, or pass centre= and scale=."
        )
    near = slice(max(best - 2, 0), best + int(_DOUBLINGS) + 1)
    rows = values[near].isfinite()
    points = (guess + scales[near, None, None] * z)[rows]
    return float(scales[best]), points, values[near][rows]


def _bounds(
    density: LogDensity, guess: Tensor, z: Tensor, y: Any, exponents: range
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Scales ``(m,)``, the values ``(m, n)`` at the draws stretched to them, the lower bounds of log Z, and how far the
    largest of these may be off by rounding."""
    d = guess.numel()
    scales = torch.tensor([2.0**j for j in exponents], dtype=guess.dtype, device=guess.device)
    values = _finite(torch.stack([density.value(guess + s * z, y) for s in scales]))
    good = values.isfinite()
    share = good.double().mean(1)
    mean = torch.where(good, values, torch.zeros_like(values)).double().sum(1) / good.sum(1).clamp(min=1)
    bound = torch.where(share > 0, mean + d * scales.double().log() + share.log(), torch.full_like(mean, -math.inf))
    return scales, values, bound, 8 * torch.finfo(guess.dtype).eps * float(mean[bound.argmax()].abs())


def _chains(
    density: LogDensity,
    guess: Tensor,
    scan_scale: float,
    known: tuple[Tensor, Tensor],
    conditions: Callable[[int, int], Any],
    seed: int,
    *,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Any, float]:
    """From points at the distances ``start`` ``(n, 1)`` (None: as the module's head says). States ``(k, n, d)`` and
    scores ``(k n, d)`` of the second half, the last states with their values, the conditions, and the acceptance."""
    like = {"dtype": guess.dtype, "device": guess.device}
    generator = generator_for(guess.device, seed, Place.PILOT_CHAINS)
    normal = lambda *shape: torch.randn(*shape, generator=generator, **like)  # noqa: E731
    uniform = lambda *shape: torch.rand(*shape, generator=generator, **like)  # noqa: E731
    n, d, smooth = _CHAINS if start is None else len(start), guess.numel(), density.differentiable
    if start is None:
        start = scan_scale * 2 ** (_DOUBLINGS * uniform(n, 1))
    x, y = guess + start * normal(n, d), conditions(n, derive_seed(seed, Place.PILOT_CHAINS_CONDITION))
    value = _finite(density.value(x, y))
    outside = value.isinf().nonzero().flatten()
    if len(outside):  # start these at points of the scan that have density
        pick = torch.randint(len(known[0]), (len(outside),), generator=generator, device=guess.device)
        x = x.index_copy(0, outside, known[0][pick])
    score = torch.zeros_like(x)

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        if not smooth:
            return _finite(density.value(x, y)), score
        value, gradient = density.value_and_score(x, y)
        return _finite(value), gradient

    value, score = evaluate(x)
    steps, goal = (_STEPS, 0.4) if smooth else (_STEPS_WITHOUT_GRADIENT, 0.25)
    log_step = (0.5 * start.squeeze(1) / math.sqrt(d)).log()
    kept, slopes, accepted = [], [], 0.0
    for k in range(steps):
        move = log_step.exp().unsqueeze(1) * normal(n, d)
        if smooth:  # Barker: the sign of each coordinate's move follows the score
            move = torch.where(uniform(n, d) < torch.sigmoid(move * score), move, -move)
        there, slope = evaluate(x + move)
        # far from a narrow target differences drown in rounding, which would hold the steps small: in doubt accept
        rounding = 8 * torch.finfo(x.dtype).eps * torch.maximum(there.abs(), value.abs())
        ratio = there - value + torch.where(rounding.isfinite(), rounding, torch.zeros_like(rounding))
        if smooth:
            logsigmoid = torch.nn.functional.logsigmoid
            ratio = ratio + (logsigmoid(-move * slope) - logsigmoid(move * score)).sum(1)
        # a chain without density yet (another condition's point) takes any point that has it
        ratio = torch.where(value.isinf() & there.isfinite(), torch.zeros_like(ratio), ratio)
        chance = torch.nan_to_num(ratio, nan=-math.inf).clamp(max=0).exp()
        take = uniform(n) < chance
        x = torch.where(take.unsqueeze(1), x + move, x)
        value, score = torch.where(take, there, value), torch.where(take.unsqueeze(1), slope, score)
        log_step = log_step + (1.0 if 2 * k < steps else 0.3) * (chance - goal)
        if 2 * k >= steps:
            accepted += 2 * float(chance.mean()) / steps
            if (steps - 1 - k) % (steps // (2 * _KEPT)) == 0:
                kept.append(x)
                slopes.append(score)
    found = _arrived(value) if y is None else value.isfinite()  # with conditions values do not compare
    states, scores = (torch.stack(v)[:, found] for v in (kept, slopes))
    return states, scores.flatten(0, 1), (x, value), y, accepted


def spread_of(states: Tensor, guess: Tensor, keep_centre: bool) -> tuple[Tensor, Tensor]:
    """Centre ``(d,)`` and scale (0-d or ``(d,)``).

    Args:
        states: ``(k, n, d)``, k states of each of n chains, which alone are independent: what their averages leave
            uncertain is no difference between coordinates.
    """
    x, n = states.double(), states.shape[1]
    levels = torch.tensor([0.02, 0.16, 0.5, 0.84, 0.98], dtype=x.dtype, device=x.device)
    lowest, low, middle, high, highest = torch.quantile(x.flatten(0, 1), levels, dim=0)
    reach = torch.maximum(_TAIL * 0.5 * (high - low), highest - lowest)  # modes that few chains found are no tail
    reach = torch.where(reach > 0, reach, x.flatten(0, 1).std(0))
    x = torch.minimum(torch.maximum(x, middle - reach), middle + reach)
    centre, mean = guess.double(), x.mean((0, 1))
    if not keep_centre:
        unsure = _ERRORS * torch.nan_to_num(x.mean(0).std(0)) / math.sqrt(n)
        close = (mean - centre).abs() < torch.maximum(0.25 * x.flatten(0, 1).std(0), unsure)
        centre = torch.where(close, centre, mean)
    squares = (x - centre).square().mean(0)
    scale = _WIDER * squares.mean(0).sqrt()
    if not bool((scale > 0).all()):
        scale = scale.clamp(min=float(scale.max()) * 1e-6)
    unsure = 0.5 * torch.nan_to_num(squares.std(0) / squares.mean(0)) / math.sqrt(n)  # of its logarithm
    apart = (scale.log() - _ERRORS * unsure).max() - (scale.log() + _ERRORS * unsure).min()
    if float(scale.max()) <= _ALIKE * float(scale.min()) or float(apart) <= 0:
        scale = scale.square().mean().sqrt()
    return centre.to(guess), scale.to(guess)


def check_rays(
    density: LogDensity, x: Tensor, scale: Tensor, y: Any, seed: int, scores: Tensor | None = None
) -> float | None:
    """Look along lines through the states x ``(n, d)`` for one on which the density does not fall.

    Args:
        scores: ``(many, d)`` at typical states, whose least directions are tried too.

    Returns:
        None: it falls within ten thousand scales, along all. Else how far out it falls, along a line on which it does
        later than that.

    Raises:
        ImproperTarget: naming the line.
    """
    n, d = x.shape
    if n == 0:
        return None
    generator = generator_for(x.device, seed, Place.PILOT_LINES)
    axes = torch.randperm(d, generator=generator_for("cpu", seed, Place.PILOT_AXES))[:_RAY_AXES].sort().values
    unit = torch.eye(d, dtype=x.dtype, device=x.device)[axes.to(x.device)]
    lines = torch.randn(_RAY_LINES, d, generator=generator, dtype=x.dtype, device=x.device)
    ways = torch.cat((unit, -unit, lines / lines.norm(dim=1, keepdim=True))) * scale
    if scores is not None and density.differentiable:
        scaled = scores.double() * scale.double()
        scaled = scaled / scaled.norm(dim=1, keepdim=True).clamp(min=1e-300)
        level = torch.linalg.eigh(scaled.mT @ scaled).eigenvectors[:, :_RAY_LEVEL].mT.to(x)
        ways = torch.cat((ways, level * scale, -level * scale))
    start = _finite(density.value(x, y))
    near, far = (_along(density, x, y, r * ways) for r in _RAY_ENDS)
    # both, since a line may cross a valley on its way (a funnel's)
    stays = (near - far < _fall(_RAY_ENDS[1] / _RAY_ENDS[0])) & (start - far < _fall(_RAY_ENDS[1]))
    flat = (far.isfinite() & near.isfinite() & stays).all(1).nonzero().flatten().tolist()
    if not flat:
        return None
    further = [_falls(density, x, y, ways[j], far[j]) for j in flat]
    if all(math.isfinite(r) for r in further):
        return max(r * float(ways[j].norm()) for r, j in zip(further, flat))
    j = next(j for r, j in zip(further, flat) if not math.isfinite(r))
    line = "a line"
    if j < 2 * len(axes):
        line = f"coordinate {int(axes[j % len(axes)])}"
    elif j >= 2 * len(axes) + _RAY_LINES:
        way = ways[j] / ways[j].norm()
        line = f"the direction {[round(v, 2) for v in way[:6].tolist()]}{' ...' if d > 6 else ''}"
    raise ImproperTarget(
        f"log_density does not fall along {line}: from {_RAY_ENDS[0]:g} to {_RAY_ENDS[1]:g} scales out it changes "
        f"by {float((far - near)[j].max()):.3g}, and a density must fall faster than 1/distance, so its integral "
        "looks infinite. Fix what that direction lacks (a prior, a gauge, a centre of mass)."
    )


def _fall(times: float) -> float:
    """By how much a log density must fall where the distance grows so many times: faster than 1/distance, nearly."""
    return 0.9 * math.log(times)


def _along(density: LogDensity, x: Tensor, y: Any, ways: Tensor) -> Tensor:
    """Log densities ``(ways, n)`` that far from each of x ``(n, d)``."""
    many = None if y is None else y.repeat(len(ways), *(1 for _ in y.shape[1:]))
    return _finite(density.value((x[None] + ways[:, None]).flatten(0, 1), many)).reshape(len(ways), len(x))


def _falls(density: LogDensity, x: Tensor, y: Any, way: Tensor, far: Tensor) -> float:
    """How many times ``way`` out the density has fallen, from all of x, since the outer end; inf: it does not, or it is
    no number there."""
    for times in _RAY_FURTHER:
        there = _along(density, x, y, (_RAY_ENDS[1] * times * way).unsqueeze(0))[0]
        if not bool(there.isfinite().all()):
            break
        if bool((far - there > _fall(times)).all()):
            return _RAY_ENDS[1] * times
    return math.inf
