"""Tempered particles: sequential Monte Carlo from a Gaussian, or a mixture of them, to ``N(z; 0, I) exp(phi(z))``, and
chains on any of its tempered laws.

Every problem of the package has this form. A path of a chain is a function of its standard normal noises, and
``phi = R/alpha - log dP^u/dQ0`` of that path (:class:`NoiseTarget`): ``exp(phi)`` integrates to the chain's Z under
N(0, I). A Gibbs target has it in its own state space (:class:`StateTarget`), z the normalised state.

Particles go through ``N(0, I) exp(beta_j phi)``, ``0 = beta_0 < ... < beta_J = 1``. At each level they are weighted by
``exp((beta_{j+1} - beta_j) phi)``, resampled, and moved by a Markov kernel that leaves the new law invariant (Neal
2001; Del Moral et al. 2006). With levels and kernels fixed beforehand ``E Z^ = Z`` exactly for any number of particles:
:func:`~.ascent.adapt` chooses them on particles of its own, :func:`run_tempered` uses them on new ones.

The kernel is Hamiltonian Monte Carlo whose flow is split into the exact rotation of a Gaussian fitted to the particles,
``N(m, S)``, and kicks by what the target differs from it (Beskos et al. 1103.2643; Shahbaba et al. 1106.5941): no error
in the directions where the target is that Gaussian, and none from their number. Particles that begin with a mixture m
(``law``) go through ``m^(1 - beta) (N(0, I) exp(phi))^beta``; each of them then moves in the coordinates of a component
drawn given its place (:class:`Component`), and an independent draw from m is proposed after every such move
(:meth:`Kernel.independence_move`). One leapfrog step, of this flow, is a MALA move; without a gradient it is the
preconditioned Crank-Nicolson move (Cotter et al. 1202.0709). Of paths of tokens, whose maxima jump in the noises, a
move draws the noises of some positions anew and keeps all others: reversible for the same reason, angle by angle.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..chains.base import Chain
from ..chains.shifts import shift_function
from ..errors import NonFiniteError
from ..paths.integrator import integrate
from ..paths.paths import Paths
from ..paths.rows import between_ranks
from ..paths.weights import effective_fraction
from ..precision import full_precision
from ..problems.problem import ControlProblem
from ..processes.laws import Gaussian, GaussianMixture, ProductMixture
from ..randomness import Place, SuppliedNoise, derive_seed, generator_for
from .smc import resample

# Largest dimension in which a whole covariance is fitted, and in which one is where correlations are more than noise.
_FULL_COVARIANCE, FULL_WHERE_CORRELATED = 64, 256
_NOISE = 0.5  # part of the squares of correlations, above which they are
# a move's angle is the level's, times exp of a uniform number in [-3, 0]: targets may be narrow in places (funnels)
_JITTER = 3.0
_MOST_LEAPFROG = 16
_TURN = 1.2  # radians that a whole trajectory turns
ACCEPT = {True: 0.75, False: 0.35}  # wanted acceptance with and without a gradient
ROUGHEST, COARSEST = 1e-4, math.pi / 2  # angles
RESAMPLE = 0.6  # effective fraction below which a system is resampled
_FAR = 100.0  # standard deviations of the reference
_GONE = 1e6  # and beyond which a trajectory has diverged
_ROWS = 16384  # particles moved at once
_HELD = 1 << 19  # numbers of a mixture's terms held at once


class TemperedTarget(Protocol):
    """``N(z; 0, I) exp(phi(z))``.

    Attributes:
        dim: of z. smooth: whether phi has a gradient.
        law: what particles begin with, of z; None: N(0, I). Levels go from it to the target.
        batch_size: points that are evaluated at a time (a multiple of 64); None: all. Their values are the same.
        parts: ``(dim,)`` int64, to which part a coordinate belongs, where phi jumps and moves redraw some of the parts;
            None: moves turn all coordinates a little.
    """

    dim: int
    smooth: bool
    dtype: torch.dtype
    device: torch.device
    law: GaussianMixture | ProductMixture | None
    batch_size: int | None
    parts: Tensor | None

    def draw_origin(self, n: int, seed: int) -> Tensor:
        """What particles keep from the beginning and no move changes, ``(n, ...)``; mostly nothing, ``(n, 0)``."""
        ...

    def log_ratio(self, z: Tensor, origin: Tensor) -> Tensor:
        """phi, ``(n,)``, with its graph where z wants one; -inf where the density vanishes."""
        ...

    def log_joint(self, z: Tensor, origin: Tensor) -> Tensor:
        """The log density of z, ``phi + log N(z; 0, I)``, likewise: what levels from another law are made of, without
        the rounding of two large numbers where that Gaussian is far away."""
        ...


class StateTarget:
    """A log density in its own space: ``x = centre + scale maps(z)``.

    Args:
        log_density: ``(n, dim) -> (n,)``, unnormalised.
        centre, scale: ``(dim,)``; wide enough to cover the target.
        law: of z, which particles begin with instead of the Gaussian.
        maps: one to one, ``z -> (maps(z), log |d maps/dz|)``, ``(n, dim)`` and ``(n,)``: non-centred coordinates
            (:class:`~.noncentred.Maps`). None: z itself.
    """

    def __init__(
        self,
        log_density: Callable[[Tensor], Tensor],
        centre: Tensor,
        scale: Tensor,
        smooth: bool = True,
        law: GaussianMixture | ProductMixture | None = None,
        maps: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.log_density, self.centre, self.scale, self.smooth = log_density, centre, scale, smooth
        self.law, self.maps = law, maps
        self.dim, self.dtype, self.device = centre.numel(), centre.dtype, centre.device
        self.batch_size: int | None = None  # evaluations at a time
        self.parts: Tensor | None = None
        self.volume = float(scale.double().log().sum())

    def draw_origin(self, n: int, seed: int) -> Tensor:
        return self.centre.new_zeros(n, 0)

    def states(self, z: Tensor) -> Tensor:
        return self._mapped(z)[0]

    def _mapped(self, z: Tensor) -> tuple[Tensor, Tensor | float]:
        """x, and the logarithm of how much larger a volume is there."""
        if self.maps is None:
            return self.centre + self.scale * z, self.volume
        w, level = self.maps(z)
        return self.centre + self.scale * w, level + self.volume

    def log_ratio(self, z: Tensor, origin: Tensor) -> Tensor:
        return self.log_joint(z, origin) + 0.5 * z.square().sum(1) + 0.5 * self.dim * math.log(2 * math.pi)

    def log_joint(self, z: Tensor, origin: Tensor) -> Tensor:
        x, volume = self._mapped(z)
        return self.log_density(x) + volume

    def log_density_at(self, z: Tensor, phi: Tensor) -> Tensor:
        """The log density ``(n,)`` at points whose phi (of :class:`Points`) is known, without asking for it again."""
        volume = self.volume if self.maps is None else self._mapped(z)[1]
        volume = volume.double() if isinstance(volume, Tensor) else volume
        if self.law is None:
            return phi.double() - 0.5 * z.double().square().sum(1) - 0.5 * self.dim * math.log(2 * math.pi) - volume
        return phi.double() + self.law.log_prob(z).double() - volume


class NoiseTarget:
    """The paths of a chain as functions of their noises under a proposal u: ``phi = R/alpha - log dP^u/dQ0``.

    ``z`` are the noises ``(K, *noise)`` of a path, flattened, after those of its start where that is Gaussian. A start
    of another law is drawn once for each particle and only resampled. The problem has no conditions.
    """

    def __init__(self, problem: ControlProblem, chain: Chain, control: Any = None) -> None:
        self.problem, self.chain, self.control = problem, chain, control
        self.law: GaussianMixture | ProductMixture | None = None
        known = problem.start != "controlled" and isinstance(problem.initial, Gaussian)
        self.gaussian = problem.initial if known else None
        self.before = chain.event_shape.numel() if self.gaussian is not None else 0
        self.shape = (chain.steps, *chain.noise_shape)
        self.dim = self.before + math.prod(self.shape)
        self.dtype, self.device, self.smooth = problem.dtype, problem.device, problem.has_gradient
        self.batch_size: int | None = None  # paths at a time
        self.parts = None if chain.state_dtype is None else self._parts()

    def _parts(self) -> Tensor:
        """Of tokens: the noises of a position, at all steps; of a single one, those of a step."""
        steps, positions = self.chain.steps, self.chain.event_shape.numel()
        index = torch.arange(positions) if positions > 1 else torch.arange(steps).unsqueeze(1)
        return index.unsqueeze(-1).expand(steps, positions, self.chain.noise_shape[-1]).flatten().to(self.device)

    def draw_origin(self, n: int, seed: int) -> Tensor:
        if self.gaussian is not None:
            return torch.zeros(n, 0, dtype=self.dtype, device=self.device)
        return self.problem.draw_start(n, seed)

    def paths(self, z: Tensor, origin: Tensor, keep: str = "all") -> Paths:
        """The paths that these noises make."""
        chain, n = self.chain, len(z)
        if self.gaussian is not None:
            start = z[:, : self.before].reshape(n, *chain.event_shape)
            origin = self.gaussian.mean + self.gaussian.shape_noise(start)
        noise = SuppliedNoise(z[:, self.before :].reshape(n, *self.shape).transpose(0, 1))
        shift = None if self.control is None else shift_function(chain, self.control)
        f = self.problem.running_cost_or_none
        return integrate(chain, origin, noise, shift, running_cost=f, keep=keep).towards(self.problem)

    def log_ratio(self, z: Tensor, origin: Tensor) -> Tensor:
        paths = self.paths(z, origin, "all" if z.requires_grad else "end")
        return paths.towards(self.problem, self.problem.reward(paths.samples)).log_weights()

    def log_joint(self, z: Tensor, origin: Tensor) -> Tensor:
        return self.log_ratio(z, origin) - 0.5 * z.square().sum(1) - 0.5 * self.dim * math.log(2 * math.pi)


@dataclass(frozen=True)
class Ladder:
    """Levels between what particles begin with and the target, and the kernel of each.

    Attributes:
        betas: ``(J,)``, increasing, the last is 1.
        centres: ``(J, dim)``; factors: ``(J, dim, dim)``, or ``(J, dim)`` of a diagonal: the Gaussians fitted to the
            levels (not used by particles that begin with a mixture).
        angles: ``(J,)`` radians turned by one leapfrog step.
        leapfrog_steps, moves: ``(J,)`` steps of a move, and moves.
    """

    betas: Tensor
    centres: Tensor
    factors: Tensor
    angles: Tensor
    leapfrog_steps: Tensor
    moves: Tensor

    def __len__(self) -> int:
        return len(self.betas)

    @property
    def work(self) -> int:
        """Evaluations that one particle costs: gradients of a smooth target, values of another; without the independent
        draws that a mixture proposes, one more for every move."""
        return 1 + int((self.leapfrog_steps * self.moves).sum())


@dataclass(frozen=True)
class Population:
    """M systems of N particles of the target.

    Attributes:
        z: ``(M, N, dim)``. phi: ``(M, N)``. origin: ``(M, N, ...)``.
        log_weights: ``(M, N)``, normalised in each system.
        log_z: ``(M,)``.
        ess: ``(J,)`` effective fraction before each level's moves.
        resampled: ``(J,)`` fraction of systems.
        evaluations: of phi (with its gradient where it has one), in all.
        variance: of Z^ over its square, estimated from one system that has chosen its ladder; None for those on a given
            one, which differ among themselves.
    """

    z: Tensor
    phi: Tensor
    origin: Tensor
    log_weights: Tensor
    log_z: Tensor
    ess: Tensor
    resampled: Tensor
    evaluations: int
    variance: float | None = None


@dataclass(frozen=True)
class Points:
    """Particles ``(n, dim)`` with phi and its gradient (zero where there is none).

    Where particles begin with another law m than N(0, I), phi is what the target has beyond m: the law of a level is
    ``N(0, I) exp(beta phi)`` or ``m exp(beta phi)``.
    """

    z: Tensor
    phi: Tensor
    slope: Tensor
    origin: Tensor

    def rows(self, index: Tensor) -> Points:
        return Points(*(part[index] for part in vars(self).values()))

    def where(self, keep: Tensor, old: Points) -> Points:
        """These where ``keep``, else the old ones."""
        pairs = zip(vars(self).values(), vars(old).values())
        return Points(*(torch.where(keep.reshape(-1, *(1,) * (a.ndim - 1)), a, b) for a, b in pairs))


def _value_and_slope(target: TemperedTarget, z: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
    """phi and its gradient, or of a target with a law of its own those of the log density."""
    value = target.log_ratio if target.law is None else target.log_joint
    if not target.smooth:
        with torch.no_grad():
            return value(z, origin), torch.zeros_like(z)
    with torch.enable_grad():
        leaf = z.requires_grad_(True)
        phi = value(leaf, origin)
        return phi.detach(), torch.autograd.grad(phi.sum(), leaf)[0]


def points_at(target: TemperedTarget, z: Tensor, origin: Tensor) -> Points:
    """The target evaluated once at each of ``(n, dim)``.

    Raises:
        NonFiniteError: a log density that is nan or +inf (far outside that counts as -inf).
    """
    phi, slope = between_ranks(lambda *rows: _value_and_slope(target, *rows), target.batch_size, z.detach(), origin)
    z = z.detach()
    if target.law is not None:
        rows = max(64, _HELD // target.law.means.numel())  # few at a time stay in the cache
        pairs = [target.law.log_prob_and_score(part) for part in z.split(rows)]
        phi = phi - torch.cat([p[0] for p in pairs])
        if target.smooth:
            slope = slope - torch.cat([p[1] for p in pairs])
    # trajectories that diverge end far outside, where a density may well be inf - inf: those moves are rejected
    far = z.abs().amax(1) > _FAR
    phi = torch.where(far & ~phi.isfinite(), -math.inf, phi)
    if bool((phi.isnan() | (phi == math.inf)).any()):
        rows = int((phi.isnan() | (phi == math.inf)).sum())
        raise NonFiniteError(
            f"the log density is nan or +inf in {rows} of {len(phi)} rows (largest |z|: {float(z.abs().max()):.3g} "
            "standard deviations of the reference). It may be -inf where the density vanishes, but nothing else that "
            "is not finite.",
            what="log density",
            rows=rows,
        )
    inside = phi > -math.inf
    slope = torch.where(inside.unsqueeze(1) & slope.isfinite(), slope, 0.0)
    return Points(z, phi, slope, origin)


@dataclass(frozen=True)
class Fitted:
    """Coordinates w in which the Gaussian fitted to a level is standard normal, the same for all particles; that level
    is ``N(0, I) exp(beta phi)``."""

    centre: Tensor
    factor: Tensor

    def standardise(self, z: Tensor) -> Tensor:
        if self.factor.ndim == 1:
            return (z - self.centre) / self.factor
        return torch.linalg.solve_triangular(self.factor, (z - self.centre).mT, upper=False).mT

    def unstandardise(self, w: Tensor) -> Tensor:
        return self.centre + (w * self.factor if self.factor.ndim == 1 else w @ self.factor.mT)

    def energy(self, p: Points, w: Tensor, v: Tensor, beta: float) -> Tensor:
        return 0.5 * (p.z.double().square().sum(1) + v.double().square().sum(1)) - beta * p.phi.double()

    def residual_gradient(self, p: Points, w: Tensor, beta: float) -> Tensor:
        """Gradient in w of what the potential has beyond ``|w|^2/2``."""
        slope = p.z - beta * p.slope
        return (slope * self.factor if self.factor.ndim == 1 else slope @ self.factor) - w


@dataclass(frozen=True)
class Component:
    """Coordinates in which a component of the law is standard normal, one for each particle.

    The component is drawn with its probability given z, so that z given it has the density
    ``m exp(beta phi) r_i(z) = weight_i N_i(z) exp(beta phi)``: a Gaussian whose flow is an exact rotation, and kicks by
    phi alone, which vanish as the law comes near the target.
    """

    centre: Tensor
    widths: Tensor
    axes: Tensor | None

    def standardise(self, z: Tensor) -> Tensor:
        d = z - self.centre
        return (d if self.axes is None else (d.unsqueeze(1) @ self.axes).squeeze(1)) / self.widths

    def unstandardise(self, w: Tensor) -> Tensor:
        d = w * self.widths
        return self.centre + (d if self.axes is None else (self.axes @ d.unsqueeze(2)).squeeze(2))

    def energy(self, p: Points, w: Tensor, v: Tensor, beta: float) -> Tensor:
        return 0.5 * (w.double().square().sum(1) + v.double().square().sum(1)) - beta * p.phi.double()

    def residual_gradient(self, p: Points, w: Tensor, beta: float) -> Tensor:
        slope = -beta * p.slope
        return (slope if self.axes is None else (slope.unsqueeze(1) @ self.axes).squeeze(1)) * self.widths


@dataclass(frozen=True)
class Kernel:
    """One move at one level; see the module's head.

    Attributes:
        beta: the level; 1 for the target itself. centre, factor: the fitted Gaussian, as in :class:`Ladder`; of a
            target whose particles begin with a mixture its components are taken instead.
        leapfrog_steps: of a move, each of one evaluation.
        jitter: the angle of a move is the given one times ``exp(-jitter U)``, U uniform in [0, 1].
    """

    beta: float
    centre: Tensor
    factor: Tensor
    leapfrog_steps: int
    jitter: float = _JITTER

    def move(
        self, target: TemperedTarget, p: Points, angle: float | Tensor, generator: torch.Generator
    ) -> tuple[Points, Tensor]:
        """The particles after a move, and which of them moved; ``angle`` of all, or ``(n, 1)``."""
        n, like = len(p.z), {"generator": generator, "dtype": p.z.dtype, "device": p.z.device}
        v = torch.randn(p.z.shape, **like)
        turn = angle * torch.exp(-self.jitter * torch.rand((n, 1), **like))
        turn = turn.clamp(max=COARSEST)
        if target.parts is not None:
            turn = _redrawn(turn, target.parts, generator)
        uniform = torch.rand(n, **like)
        frame = (
            Fitted(self.centre, self.factor) if target.law is None else Component(*target.law.component(p.z, generator))
        )
        w, new = frame.standardise(p.z), p
        before = frame.energy(p, w, v, self.beta)
        lost = torch.zeros(
            n, 1, dtype=torch.bool, device=p.z.device
        )  # trajectories that diverge are not followed, and rejected
        for _ in range(self.leapfrog_steps):
            if target.smooth:
                v = v - 0.5 * turn * frame.residual_gradient(new, w, self.beta)
            w, v = w * turn.cos() + v * turn.sin(), v * turn.cos() - w * turn.sin()
            z = frame.unstandardise(w)
            lost = lost | ~(z.abs().amax(1, keepdim=True) < _GONE)  # nan too
            new = points_at(target, torch.where(lost, p.z, z), p.origin)
            if target.smooth:
                v = v - 0.5 * turn * frame.residual_gradient(new, w, self.beta)
        change = torch.where(lost.squeeze(1), -math.inf, before - frame.energy(new, w, v, self.beta))
        accept = uniform.double().log() < torch.nan_to_num(change, nan=-math.inf)
        return new.where(accept, p), accept

    def independence_move(self, target: TemperedTarget, p: Points, generator: torch.Generator) -> Points:
        """The particles after each was offered a draw of the law that they began with, however far: an independence
        Metropolis move, which is accepted with probability ``exp(beta (phi' - phi))``. The better the law, the more
        are."""
        assert target.law is not None
        new = points_at(target, _draws(target, len(p.z), generator), p.origin)
        uniform = torch.rand(len(p.z), generator=generator, dtype=p.z.dtype, device=p.z.device)
        change = self.beta * (new.phi.double() - p.phi.double())
        return new.where(uniform.double().log() < torch.nan_to_num(change, nan=-math.inf), p)


def _redrawn(turn: Tensor, parts: Tensor, generator: torch.Generator) -> Tensor:
    """Angles ``(n, dim)``: a quarter turn, which is a new draw, for some of the parts, one at least, and 0 for the
    others; in the mean the share of a quarter turn that is ``turn (n, 1)``."""
    like, count = {"generator": generator, "device": turn.device}, int(parts.max()) + 1
    chosen = torch.rand((len(turn), count), dtype=turn.dtype, **like) < turn / COARSEST
    chosen.scatter_(1, torch.randint(count, (len(turn), 1), **like), True)
    return torch.where(chosen[:, parts], COARSEST, 0.0).to(turn)


def fit_gaussian(z: Tensor, weights: Tensor, near: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and (triangular or diagonal) factor of weighted particles; diagonal above 64 dimensions where correlations
    are hardly more than noise, and above 256.

    Correlations are shrunk towards none, by the part of their squares that is noise (Schafer & Strimmer 2005), in the
    coordinates of the factor ``near`` (of the level before; None: in those of z): shrunk in others, a narrow direction
    across the axes would take on a part of the wide ones' variance.
    """
    v, w, d = z.double(), weights.double().unsqueeze(1), z.shape[1]
    near = None if near is None or near.ndim == 1 else near.double()
    if near is not None:
        v = torch.linalg.solve_triangular(near, v.mT, upper=False).mT
    mean = (w * v).sum(0)
    centred = v - mean
    var = (w * centred.square()).sum(0)
    floor = 1e-8 * var + 1e-14 * var.mean() + 1e-30
    scale = (var + floor).sqrt()
    if d > FULL_WHERE_CORRELATED:
        return mean.to(z), scale.to(z)
    cov = (w * centred).mT @ centred
    off = (cov / (scale * scale.unsqueeze(1))).fill_diagonal_(0.0).square().sum()
    noise = d * (d - 1) * float(weights.double().square().sum())
    shrink = min(1.0, noise / max(float(off), 1e-300))
    if near is None and d > _FULL_COVARIANCE and shrink > _NOISE:
        return mean.to(z), scale.to(z)
    cov = (1 - shrink) * cov + torch.diag(shrink * var + floor)
    factor = torch.linalg.cholesky(cov)
    if near is not None:
        mean, factor = near @ mean, near @ factor
    return mean.to(z), factor.to(z)


@full_precision()
def run_tempered(target: TemperedTarget, ladder: Ladder, systems: int, particles: int, seed: int) -> Population:
    """Run independent systems of particles up a given ladder: ``E exp(log_z) = Z`` for each of them."""
    M, N = systems, particles
    size = max(1, _ROWS // N)
    if size < M:
        parts = [
            run_tempered(target, ladder, min(size, M - low), N, derive_seed(seed, Place.TEMPERED_GROUP, low))
            for low in range(0, M, size)
        ]
        joined: dict[str, Any] = {
            name: torch.cat([getattr(q, name) for q in parts])
            for name in ("z", "phi", "origin", "log_weights", "log_z")
        }
        share = torch.tensor([len(q.log_z) / M for q in parts], dtype=torch.float64, device=parts[0].ess.device)
        means: dict[str, Any] = {
            name: share @ torch.stack([getattr(q, name) for q in parts]) for name in ("ess", "resampled")
        }
        return Population(**joined, **means, evaluations=sum(q.evaluations for q in parts))
    generator = generator_for(target.device, seed, Place.TEMPERED)
    p = start_points(target, M * N, seed)
    log_w = p.phi.new_full((M, N), -math.log(N), dtype=torch.float64)
    log_z = log_w.new_zeros(M)
    own = torch.arange(M * N, device=p.z.device).reshape(M, N)
    beta, facts = 0.0, []
    for j in range(len(ladder)):
        new = float(ladder.betas[j])
        log_w = log_w + increment(new - beta, p.phi).reshape(M, N)
        level = log_w.logsumexp(1)
        log_z, log_w, beta = log_z + level, log_w - level.unsqueeze(1), new
        ess = effective_fraction(log_w.exp(), 1)
        poor = (ess < RESAMPLE).unsqueeze(1)
        if bool(poor.any()):
            chosen = own[:, :1] + resample(log_w, N, "systematic", generator)
            p = p.rows(torch.where(poor, chosen, own).flatten())
            log_w = torch.where(poor, -math.log(N), log_w)
        kernel = Kernel(beta, ladder.centres[j], ladder.factors[j], int(ladder.leapfrog_steps[j]))
        for _ in range(int(ladder.moves[j])):
            p, _ = kernel.move(target, p, float(ladder.angles[j]), generator)
            if target.law is not None:
                p = kernel.independence_move(target, p, generator)
        facts.append((float(ess.mean()), float(poor.double().mean())))
    all_facts = torch.tensor(facts, dtype=torch.float64, device=p.z.device)
    return Population(
        p.z.unflatten(0, (M, N)),
        p.phi.unflatten(0, (M, N)),
        p.origin.unflatten(0, (M, N)),
        log_w,
        log_z,
        all_facts[:, 0],
        all_facts[:, 1],
        M * N * (ladder.work + (int(ladder.moves.sum()) if target.law is not None else 0)),
    )


def _draws(target: TemperedTarget, n: int, generator: torch.Generator) -> Tensor:
    """What particles begin with, ``(n, dim)``."""
    if target.law is not None:
        return target.law._draw_block(n, generator)
    return torch.randn((n, target.dim), generator=generator, dtype=target.dtype, device=target.device)


def start_points(target: TemperedTarget, n: int, seed: int) -> Points:
    """What particles begin with.

    Raises:
        NonFiniteError: the log density is -inf at all of them, or as :func:`points_at`.
    """
    generator = generator_for(target.device, seed, Place.POINTS)
    origin = target.draw_origin(n, derive_seed(seed, Place.POINTS_START))
    p = points_at(target, _draws(target, n, generator), origin)
    if not bool((p.phi > -math.inf).any()):
        raise NonFiniteError(
            f"the log density is -inf at all {n} points that the search begins with. Give a centre and a scale that "
            "cover the region where it is finite.",
            what="log density",
            rows=n,
        )
    return p


def increment(step: float, phi: Tensor) -> Tensor:
    """What a step of the levels adds to log weights; -inf where the density vanishes."""
    return torch.where(phi > -math.inf, step * phi.double(), -math.inf)


def leapfrog_steps_for(angle: float, smooth: bool) -> int:
    """Leapfrog steps of a move whose trajectory turns far enough; one where there is no gradient."""
    return max(1, min(_MOST_LEAPFROG, round(_TURN / angle))) if smooth else 1
