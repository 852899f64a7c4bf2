"""Systems of particles: the Feynman-Kac recursion on a chain, with twisting and resampling, in log space.

Particles move by a proposal u. With twists ``psi_k`` (``psi_K = exp(r/alpha)``) the step from k to k+1 multiplies the
weight of a particle by ``exp(-h_k f/alpha) (dQ0/dP^u)_k psi_{k+1}(x_{k+1}) / psi_k(x_k)``, the first weight being
``psi_0(x_0)``. The product telescopes to ``exp(R/alpha) dQ0/dP^u`` whatever the twists, so ``E Z^ = Z`` exactly, at
every step size and with any unbiased resampling (Del Moral 2004; Naesseth et al. 1903.04797; twisting: Whiteley & Lee
1309.2931, Wu et al. 2306.17775).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from ..chains.base import Chain
from ..chains.shifts import shift_function
from ..controls.given import ZeroControl
from ..paths.chunks import check_chunk
from ..paths.integrator import integrate
from ..paths.rows import chunks_of, padded_rows
from ..paths.weights import effective_number
from ..precision import full_precision
from ..problems.problem import ControlProblem
from ..randomness import BLOCK, Place, SeededNoise, derive_seed, generator_for

RESAMPLING = ("systematic", "stratified", "multinomial")
_ROWS = 8192  # particles moved at once

#: ``(x, t, y) -> log psi``, ``(batch,)``, t 0-d.
Twist = Callable[[Tensor, Tensor, Any], Tensor]


@dataclass(frozen=True)
class Particles:
    """M systems of N particles at the end of the chain.

    Attributes:
        end: ``(M, N, *event)`` states, before ``decode``.
        log_weights: ``(M, N)``, normalised: their exponentials sum to 1 in each system.
        log_z: ``(M,)``, ``log Z^`` of each system: ``E exp(log_z) = Z``.
        reward, running_cost, log_ratio: ``(M, N)``, along each particle's ancestry.
        condition: ``(M, ...)``, one per system, or None.
        beside: ``(M, N)`` log-ratio of another control along the same ancestry, where one was asked for.
        ess: ``(K,)`` effective fraction of the weights after each step, mean over systems.
        resampled: ``(K,)`` fraction of the systems that were resampled after each step.
    """

    end: Tensor
    log_weights: Tensor
    log_z: Tensor
    reward: Tensor
    running_cost: Tensor
    log_ratio: Tensor
    condition: Any
    ess: Tensor
    resampled: Tensor
    beside: Tensor | None = None


@dataclass(frozen=True)
class ParticleSettings:
    """How samples are made from systems of particles.

    Attributes:
        num_particles: N of each system.
        ess_threshold: a system whose effective fraction falls below it is resampled (before the last step only); 0:
            never.
        resampling: "systematic", "stratified" or "multinomial" (:func:`resample`).
        selection: "weights": in proportion to the weights. "best": the particle of the largest total reward.
            "rejection": each with probability ``exp(R/alpha - bound/alpha)``.
        independent: one sample per system; else all particles of as many systems as are needed.
        bound: of the total reward, for rejection.
    """

    num_particles: int
    ess_threshold: float = 0.5
    resampling: str = "systematic"
    selection: str = "weights"
    independent: bool = False
    bound: float | None = None


@dataclass(frozen=True)
class Proposal:
    """How particles are moved and judged on the way.

    Attributes:
        control: that moves them; None: the reference.
        twist: log psi at the states before the last; None: 1.
        beside: a control that moves nothing; its log-ratio along the particles' paths is wanted.
    """

    control: Any = None
    twist: Twist | None = None
    beside: Any = None


def resample(log_weights: Tensor, count: int, scheme: str, generator: torch.Generator) -> Tensor:
    """Indices ``(M, count)`` of particles drawn with probabilities ``softmax(log_weights)`` in each of M systems.

    The expected number of copies of particle i is ``count w_i`` in every scheme. "multinomial": independent draws.
    "stratified": one uniform number in each of ``count`` equal strata. "systematic": the same number in all strata, so
    that copies differ from ``count w_i`` by less than one.
    """
    edges = log_weights.double().softmax(1).cumsum(1)
    edges = edges / edges[:, -1:]
    shape = {"systematic": (len(edges), 1)}.get(scheme, (len(edges), count))
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=edges.device)
    if scheme != "multinomial":
        uniform = (uniform + torch.arange(count, device=edges.device)) / count
    return torch.searchsorted(edges, uniform.contiguous(), right=True).clamp(max=edges.shape[1] - 1)


@torch.no_grad()
@full_precision()
def run_particles(
    problem: ControlProblem,
    chain: Chain,
    proposal: Proposal,
    systems: int,
    settings: ParticleSettings,
    seed: int,
    *,
    condition: Any = None,
    batch_size: int | None = None,
) -> Particles:
    """Run ``systems`` independent systems of particles of a proposal to the end of the chain.

    Args:
        condition: ``(systems, ...)``; default: drawn from the problem's.
        batch_size: move and judge so many particles at a time (a multiple of 64), in the memory of these; the particles
            are the same.
    """
    if batch_size is not None:
        check_chunk(batch_size, "end", name="batch_size")
    size = max(1, _ROWS // settings.num_particles)
    parts = []
    with problem.evaluating():
        for index, low in enumerate(range(0, systems, size)):
            count, where = min(size, systems - low), derive_seed(seed, Place.SYSTEMS, index)
            y = problem.draw_condition(count, where) if condition is None else condition[low : low + count]
            parts.append(_run(problem, chain, proposal, count, settings, where, y, batch_size))
    if len(parts) == 1:
        return parts[0]
    weights = torch.tensor([len(p.log_z) / systems for p in parts], dtype=torch.float64, device=parts[0].ess.device)
    joined = {
        name: torch.cat([getattr(p, name) for p in parts])
        for name in ("end", "log_weights", "log_z", "reward", "running_cost", "log_ratio", "beside")
        if getattr(parts[0], name) is not None
    }
    return Particles(
        **joined,
        condition=None if parts[0].condition is None else torch.cat([p.condition for p in parts]),
        ess=weights @ torch.stack([p.ess for p in parts]),
        resampled=weights @ torch.stack([p.resampled for p in parts]),
    )


def _run(
    problem: ControlProblem,
    chain: Chain,
    proposal: Proposal,
    M: int,
    settings: ParticleSettings,
    seed: int,
    condition: Any,
    batch_size: int | None,
) -> Particles:
    alpha, K, N = problem.alpha, chain.steps, settings.num_particles
    noise = SeededNoise(seed, M * N, K, chain.noise_shape, dtype=chain.times.dtype, device=chain.times.device)
    generator = generator_for(chain.times.device, seed, Place.RESAMPLING)
    x, y = problem.draw_start(M * N, seed), None if condition is None else condition.repeat_interleave(N, 0)
    moves = _Moves(problem, chain, proposal, noise, y, batch_size)
    psi = moves.first(x)
    log_w, log_z = psi.reshape(M, N), psi.new_zeros(M)
    cost, ratio, reward, other = (torch.zeros_like(psi) for _ in range(4))
    ess, resampled = psi.new_zeros(K), psi.new_zeros(K)
    own = torch.arange(M * N, device=x.device).reshape(M, N)
    for k in range(K):
        before = psi
        x, psi, step_cost, step_ratio, step_other = moves(k, x)
        if k + 1 == K:
            reward = psi
            psi = reward / alpha
        cost, ratio, other = cost + step_cost, ratio + step_ratio, other + step_other
        # a weight of 0 stays 0, whatever comes after
        change = torch.where(before > -math.inf, psi - before.clamp(min=-1e300), -math.inf)
        log_w = log_w + (change - step_cost / alpha - step_ratio).reshape(M, N)
        level = log_w.logsumexp(1)
        fraction = torch.where(level > -math.inf, effective_number(log_w, 1) / N, 1.0)
        ess[k] = fraction.mean()
        poor = fraction < settings.ess_threshold
        if k + 1 < K and bool(poor.any()):
            resampled[k] = poor.double().mean()
            chosen = own[:, :1] + resample(log_w, N, settings.resampling, generator)
            rows = torch.where(poor.unsqueeze(1), chosen, own).flatten()
            x, psi, cost, ratio, other = (v[rows] for v in (x, psi, cost, ratio, other))
            # the mean weight goes into Z^, and all particles begin again with weight 1
            log_z = log_z + torch.where(poor, level - math.log(N), 0.0)
            log_w = torch.where(poor.unsqueeze(1), 0.0, log_w)
    level = log_w.logsumexp(1)
    lost = level.unsqueeze(1) == -math.inf  # a system whose Z^ is 0: its particles are alike
    return Particles(
        end=x.unflatten(0, (M, N)),
        log_weights=torch.where(lost, -math.log(N), log_w - level.unsqueeze(1).clamp(min=-1e300)),
        log_z=log_z + level - math.log(N),
        reward=reward.reshape(M, N),
        running_cost=cost.reshape(M, N),
        log_ratio=ratio.reshape(M, N),
        condition=condition,
        ess=ess,
        resampled=resampled,
        beside=None if proposal.beside is None else other.reshape(M, N),
    )


class _Moves:
    """The steps of all particles, ``batch_size`` of them at a time: whatever calls a model, a twist or the reward. Of
    several processes each moves a part, and all get all of them."""

    def __init__(
        self,
        problem: ControlProblem,
        chain: Chain,
        proposal: Proposal,
        noise: SeededNoise,
        condition: Any,
        batch_size: int | None,
    ) -> None:
        self.problem, self.chain, self.proposal = problem, chain, proposal
        control = proposal.control
        self.shift = None if control is None or isinstance(control, ZeroControl) else shift_function(chain, control)
        shares = ranks.shares(noise.batch, BLOCK)
        self.counts = [noise.batch] if shares is None else [len(share) for share in shares]
        mine = range(noise.batch) if shares is None else shares[ranks.rank()]
        self.parts: list[tuple[int, Any, SeededNoise, Any]] = []
        for part in chunks_of(len(mine), batch_size or len(mine)):
            part = range(mine.start + part.start, mine.start + part.stop)
            # the last part has copies of its last row, up to the row counts that give the same bits
            chunked = len(part) < len(mine)
            rows = padded_rows(part, chain.times.device) if chunked else slice(part.start, part.stop)
            stop = part.start + len(rows) if isinstance(rows, Tensor) else part.stop
            y = None if condition is None else condition[rows]
            self.parts.append((len(part), rows, noise.rows(part.start, stop), y))

    def first(self, x: Tensor) -> Tensor:
        """log psi of the starts."""
        if self.proposal.twist is None:
            return x.new_zeros(len(x)).double()
        twist, t = self.proposal.twist, self.chain.times[0]
        return self._of_all(lambda rows, _, y: (twist(x[rows], t, y).double(),))[0]

    def __call__(self, k: int, x: Tensor) -> tuple[Tensor, ...]:
        """States after step k, log psi there (at the end the reward), and the step's running costs, log-ratios and
        log-ratios of the control beside."""
        return self._of_all(lambda rows, source, y: self._some(k, x[rows], source, y))

    def _of_all(self, some: Callable[[Any, SeededNoise, Any], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What a function gives of each part of the particles."""
        if len(self.counts) == 1:
            return self._of_parts(some)
        with ranks.together(), ranks.alone():
            found = self._of_parts(some)
        return tuple(ranks.gathered(v, self.counts, "particles") for v in found)

    def _of_parts(self, some: Callable[[Any, SeededNoise, Any], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        found = [tuple(v[:n] for v in some(rows, source, y)) for n, rows, source, y in self.parts]
        return found[0] if len(found) == 1 else tuple(map(torch.cat, zip(*found)))

    def _some(self, k: int, x: Tensor, noise: SeededNoise, y: Any) -> tuple[Tensor, ...]:
        problem, chain, twist, beside = self.problem, self.chain, self.proposal.twist, self.proposal.beside
        steps, f = range(k, k + 1), problem.running_cost_or_none
        step = integrate(chain, x, noise, self.shift, condition=y, running_cost=f, steps=steps)
        x = step.end
        psi = torch.zeros_like(x.flatten(1)[:, 0], dtype=torch.float64)
        if k + 1 == chain.steps:
            psi = problem.reward(chain.decode(x, y), y).double()
        elif twist is not None:
            psi = twist(x, chain.times[k + 1], y).double()
        other = torch.zeros_like(psi) if beside is None else step.log_ratio(beside).double()
        return x, psi, step.towards(problem).cost.double(), step.log_ratio().double(), other
