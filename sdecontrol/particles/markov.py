"""Parallel Markov chains on a density: the Hamiltonian moves of :mod:`.tempering` at the target itself, adapted in a
warm-up and then frozen.

All chains move at once, and the Gaussian of the moves is fitted to all of them together. One leapfrog step a move is
MALA (Roberts & Tweedie 1996) with the fitted Gaussian's linear part solved exactly; several are Hamiltonian Monte Carlo
(Neal 1206.1901). A kernel that goes on adapting to its own chain keeps no law, so that everything is fixed before the
first draw that counts.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..precision import full_precision
from ..randomness import Place, derive_seed, generator_for
from .diagnostics import chain_ess
from .tempering import Kernel, Points, StateTarget, fit_gaussian, leapfrog_steps_for, points_at, start_points

_ACCEPT = {True: 0.6, False: 0.75}  # wanted acceptance of MALA, and of several leapfrog steps
_JITTER = 1.0  # as in Kernel; less than in tempering, since steps are fitted to one law
_ALONE = 0.25  # of the adaptation: each chain with a step of its own, as chains that start far out need
_REFITS = (0.25, 0.4, 0.6)  # of the adaptation: where the Gaussian is fitted anew
_FROZEN = 0.2  # of the warm-up: already with the final kernel, to see how long it remembers
_MOST_THIN = 16
_SMALLEST, _LARGEST = 1e-6, math.pi / 2  # angles


@dataclass(frozen=True)
class WarmChains:
    """Chains after their warm-up, with a kernel that no longer changes. All tensors, so that files hold them.

    Attributes:
        states: ``(M, dim)`` in the coordinates of the target (:class:`StateTarget`).
        step_size: angle of a leapfrog step, ``()``; for NUTS step sizes ``(M,)``.
        centre, factor: of the fitted Gaussian, ``(dim,)`` and ``(dim, dim)`` or ``(dim,)``; for NUTS ``(0,)``, and
            inverse mass matrices ``(M, dim, dim)`` or ``(M, dim)``.
        leapfrog_steps: of a move, ``()``; 0 for NUTS. thin: moves between two draws, ``()``.
    """

    states: Tensor
    step_size: Tensor
    centre: Tensor
    factor: Tensor
    leapfrog_steps: Tensor
    thin: Tensor


@dataclass(frozen=True)
class Draws:
    """Draws of chains.

    Attributes:
        z: ``(M, N, dim)``. phi: ``(M, N)`` of the target, in float64.
        accepted: share of the moves; for NUTS nan.
        evaluations: of the log density with its gradient.
    """

    z: Tensor
    phi: Tensor
    accepted: float
    evaluations: int

    @property
    def log_density(self) -> Tensor:
        """:func:`log_density_of` the draws, ``(M, N)``."""
        return log_density_of(self.z, self.phi)


def log_density_of(z: Tensor, phi: Tensor) -> Tensor:
    """``log(N(z; 0, I) exp(phi))`` in float64: the unnormalised log density of the coordinates z, whose integral is
    Z."""
    return phi.double() - 0.5 * (z.double().square().sum(-1) + z.shape[-1] * math.log(2 * math.pi))


def finite_starts(target: StateTarget, chains: int, seed: int) -> Points:
    """Over-dispersed starts: draws of N(0, I), those where the density vanishes replaced by others.

    Raises:
        NonFiniteError: as :func:`start_points`.
    """
    p = start_points(target, chains, seed)
    inside = (p.phi > -math.inf).nonzero().flatten()
    row = torch.arange(chains, device=inside.device)
    return p.rows(torch.where(p.phi > -math.inf, row, inside[row % len(inside)]))


def thinning(z: Tensor, log_density: Tensor) -> int:
    """Moves between two draws that are nearly independent: half the autocorrelation time of the slowest coordinate, or
    of the log density.

    Args:
        z: ``(M, N, dim)`` after each move. log_density: ``(M, N)``.
    """
    ess = float(chain_ess(torch.cat((z.double(), log_density.double().unsqueeze(2)), 2)).min())
    return max(1, min(_MOST_THIN, round(0.5 * z.shape[0] * z.shape[1] / max(ess, 1e-9))))


def warm_up_chains(
    target: StateTarget,
    chains: int,
    iterations: int,
    seed: int,
    leapfrog_steps: int | None = None,
    thin: int | None = None,
) -> tuple[WarmChains, int]:
    """Start chains, adapt their kernel, and freeze it.

    At first each chain has a step of its own, by which it gets away from wherever it started. Then all have one, which
    follows their acceptance, and a Gaussian fitted to all of them at a few times. The last fifth of the moves is made
    by the final kernel.

    Args:
        leapfrog_steps: of a move; None: as many as turn the trajectory far enough.
        thin: moves between two draws; None: :func:`thinning` of the last moves.

    Returns:
        The chains, and the evaluations that this took: ``chains (1 + sum of leapfrog_steps)``.
    """
    generator = generator_for(target.device, seed, Place.WARM_UP)
    p, work = finite_starts(target, chains, derive_seed(seed, Place.WARM_UP_POINTS)), chains
    centre, factor = torch.zeros_like(p.z[0]), torch.ones_like(p.z[0])
    frozen = max(8, round(_FROZEN * iterations))
    last = iterations - frozen
    refits = {max(1, round(part * last)) for part in _REFITS}
    recent: list[Tensor] = []
    alone = torch.ones_like(p.z[:, :1])
    for _ in range(round(_ALONE * last)):
        p, accept = Kernel(1.0, centre, factor, 1, _JITTER).move(target, p, alone, generator)
        work += chains
        alone = (alone * (accept.to(alone) - _ACCEPT[True]).exp().unsqueeze(1)).clamp(_SMALLEST, _LARGEST)
        recent.append(p.z)
    angle, since = float(alone.median()), 0
    for t in range(round(_ALONE * last), last):
        if t in refits and recent:
            pool = torch.cat(recent[len(recent) // 2 :])
            centre, factor = fit_gaussian(pool, pool.new_full((len(pool),), 1 / len(pool)))
            recent, since = [], 0
        count = leapfrog_steps_for(angle, True) if leapfrog_steps is None else leapfrog_steps
        p, accept = Kernel(1.0, centre, factor, count, _JITTER).move(target, p, angle, generator)
        work += chains * count
        wanted = float(accept.double().mean()) - _ACCEPT[count == 1]
        angle = min(_LARGEST, max(_SMALLEST, angle * math.exp(wanted / math.sqrt(1 + since / 10))))
        recent.append(p.z)
        since += 1
    count = leapfrog_steps_for(angle, True) if leapfrog_steps is None else leapfrog_steps
    kernel = Kernel(1.0, centre, factor, count, _JITTER)
    judged = []
    for _ in range(frozen):
        p, _ = kernel.move(target, p, angle, generator)
        judged.append(p)
    work += chains * count * frozen
    z, phi = torch.stack([q.z for q in judged], 1), torch.stack([q.phi for q in judged], 1)
    far = thinning(z, log_density_of(z, phi)) if thin is None else thin
    turn = torch.tensor(angle, dtype=torch.float64)
    return WarmChains(p.z, turn, centre, factor, torch.tensor(count), torch.tensor(far)), work


@full_precision()
def run_chains(target: StateTarget, warm: WarmChains, draws: int, seed: int) -> Draws:
    """Go on from the warm states: ``draws`` of each chain, ``warm.thin`` moves before each. A :func:`warm_up_chains`
    with the same seed shares no draw with it."""
    generator = generator_for(target.device, seed, Place.CHAINS)
    chains, leapfrog_steps, thin = len(warm.states), int(warm.leapfrog_steps), int(warm.thin)
    p = points_at(target, warm.states, target.draw_origin(chains, seed))
    kernel = Kernel(1.0, warm.centre, warm.factor, leapfrog_steps, _JITTER)
    drawn, accepted = [], 0.0
    for _ in range(draws):
        for _ in range(thin):
            p, accept = kernel.move(target, p, float(warm.step_size), generator)
            accepted += float(accept.double().mean())
        drawn.append(p)
    z, phi = torch.stack([q.z for q in drawn], 1), torch.stack([q.phi for q in drawn], 1).double()
    moves = draws * thin
    return Draws(z, phi, accepted / moves, chains * (1 + moves * leapfrog_steps))
