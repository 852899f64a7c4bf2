"""Particles of the target, from which particle matching learns; and of the untuned model, on which it is anchored."""

import contextlib
import math

import torch
from torch import Tensor

from ..chains.bridges import ChainBridge, bridge_of
from ..controls.base import Control
from ..controls.build import build_control, corrected
from ..particles.ascent import adapt
from ..particles.levels import climb
from ..particles.smc import resample
from ..particles.tempering import NoiseTarget
from ..paths.weights import effective_number
from ..problems.simulate import simulate_chain
from ..processes.modules import copied
from ..randomness import Place, derive_seed, generator_for
from .base import Run, path_metrics
from .forward_process import Bridge, ForwardState
from .mixture_start import first_mixture, tempered_ends


class TargetParticles(ForwardState):
    """The control, and ``size`` particles of the target: both ends of their paths where bridges are known, else all of
    the paths; where there is an anchor, after them as many of the untuned model, and ``log(w/rho)`` of all."""

    def __init__(self, run: Run, size: int, anchor: bool) -> None:
        problem, chain = run.problem, run.chain
        bridge: Bridge | None = None
        if problem.running_cost_function is None:
            with contextlib.suppress(ValueError):
                bridge = bridge_of(chain, problem.start)
        super().__init__(run, _control(run, size), bridge, anchor)
        self.size = size
        self.last = copied(self.control).requires_grad_(False)  # the control, when the particles were last run
        kept = 2 if self.bridge is not None else chain.steps + 1
        stored = size if self.anchor is None else 2 * size
        self.states: Tensor
        self.draws: Tensor
        self.facts: Tensor
        self.log_ratios: Tensor
        kind = chain.state_dtype or chain.times.dtype
        self.register_buffer("states", chain.times.new_zeros(kept, stored, *chain.event_shape, dtype=kind))
        self.register_buffer("log_ratios", chain.times.new_zeros(0 if self.anchor is None else stored))
        shape = (chain.steps, size, *chain.noise_shape) if self.bridge is None and chain.of_noise else (0,)
        self.register_buffer("draws", chain.times.new_zeros(shape))
        # reward, running cost, KL, objective and its error, log Z, ESS: of the control, when the particles were last
        # run
        self.register_buffer("facts", torch.full((7,), math.nan, dtype=torch.float64, device=chain.times.device))

    @torch.no_grad()
    def renew(self, run: Run) -> None:
        """Temper particles from the paths of the control as it is."""
        problem, chain, N = run.problem, run.chain, self.size
        seed = derive_seed(run.seed, Place.MATCHING_PARTICLES, run.iteration)
        target = tempered_ends(problem, chain, self.control)
        _, found = climb(target, N, seed) if isinstance(target, NoiseTarget) else adapt(target, N, seed)
        generator = generator_for(chain.times.device, seed, Place.MATCHING_PICK)
        rows = resample(found.log_weights, N, "systematic", generator)[0]
        z, origin = found.z[0, rows], found.origin[0, rows]
        if isinstance(target, NoiseTarget):
            drawn = target.paths(z, origin)
            if self.bridge is None:
                self.states.copy_(drawn.states)
                if chain.of_noise:
                    self.draws.copy_(drawn.noises + drawn.shifts)
            else:
                self.states[:, :N] = torch.stack((drawn.states[0], drawn.end))
        else:
            assert isinstance(self.bridge, ChainBridge)
            end = target.states(z)
            noise = torch.randn(end.shape, generator=generator, dtype=end.dtype, device=end.device)
            self.states.copy_(torch.stack((self.bridge.start_given_end(problem.initial, end, noise), end)))
        if self.anchor is not None:
            self._weigh(run)
        paths = target if isinstance(target, NoiseTarget) else NoiseTarget(problem, chain, self.control)
        self._note(run, paths, float(found.log_z))

    def _weigh(self, run: Run) -> None:
        """Ends of the untuned model, drawn once, and the ratios of the weights of all."""
        problem, N = run.problem, self.size
        if not bool(self.log_ratios.any()):
            seed = derive_seed(run.seed, Place.MATCHING_UNTUNED)
            self.states[:, N:] = simulate_chain(problem, run.chain, N, seed=seed, keep="end").end
        ends = self.states[1].split(run.batch_size)
        value = torch.cat([problem.reward(run.chain.decode(x, None), None) for x in ends]) / problem.alpha
        self.log_ratios.copy_(balanced(value[:N], value[N:]))

    def _note(self, run: Run, target: NoiseTarget, log_z: float) -> None:
        """How good the control is now, from paths of its own."""
        generator = generator_for(target.device, run.seed, Place.MATCHING_OWN, run.iteration)
        z = torch.randn((run.batch_size, target.dim), generator=generator, dtype=target.dtype, device=target.device)
        place = derive_seed(run.seed, Place.MATCHING_OWN_START, run.iteration)
        paths = target.paths(z, target.draw_origin(run.batch_size, place))
        metrics, log_w = path_metrics([paths]), paths.log_weights()
        ess = float(effective_number(log_w)) / len(log_w)
        names = ("reward", "running_cost", "kl", "objective", "objective_stderr")
        self.facts.copy_(torch.tensor([*(metrics[name] for name in names), log_z, ess], dtype=torch.float64))


def _control(run: Run, size: int) -> Control:
    """The user's, or a tuned copy of the model; else a network, beside the control towards a mixture fitted to
    particles where that pays."""
    problem, chain = run.problem, run.chain
    place = derive_seed(run.seed, Place.MATCHING_START)
    base = first_mixture(problem, chain, size, place) if run.control is None else None
    if base is None:
        return build_control(problem, chain, run.control, seed=run.seed)
    return corrected(problem, chain, base, seed=run.seed)


def balanced(tilted: Tensor, untuned: Tensor) -> Tensor:
    """``log(w/rho) = R/alpha - log Z`` of as many ends of Q_fine as of the reference, from their ``R/alpha``.

    Relative to the even mixture of both, ``w = 2/(1 + rho/w)`` and ``rho = 2/(1 + w/rho)``: neither exceeds 2. log Z is
    Bennett's (1976, J. Comput. Phys. 22), for which w, and so rho, has mean 1.
    """
    value = torch.cat((tilted, untuned)).double()
    low, high = value.min(), value.max()
    for _ in range(60):  # bisections: to rounding
        middle = 0.5 * (low + high)
        fits = (value - middle).sigmoid().mean() >= 0.5
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return (value - low).to(tilted.dtype)
