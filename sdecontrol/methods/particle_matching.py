"""``ParticleMatching``: particles find the target, bridges to them teach the control, and the control moves the next
particles."""

import contextlib
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..chains.bridges import ChainBridge, NoisingBridge, bridge_of
from ..chains.masking import MaskingBridge
from ..chains.shifts import shifts_along
from ..controls.base import Control
from ..controls.build import build_control, corrected
from ..controls.mixture import CorrectedControl
from ..particles.smc import resample
from ..particles.tempering import NoiseTarget, adapt
from ..paths.weights import effective_number
from ..problems.problem import ControlProblem
from ..randomness import Place, derive_seed, generator_for
from ..tensors import check_count
from .base import Method, Run, Visited, path_metrics, register
from .mixture_start import first_mixture, tempered_ends
from .regression import RegressionState, regress

_JUDGING = 8  # batches of new bridges on which a correction is judged


class _State(RegressionState):
    """The control, and particles of the target: both ends of their paths where bridges are known, else all of the
    paths."""

    def __init__(self, run: Run, size: int) -> None:
        problem, chain = run.problem, run.chain
        super().__init__(run, _control(run, size))
        #: what draws the middle of a path anew given its end, under Q_fine as under the reference; None: nothing known
        #: does
        self.bridge: ChainBridge | NoisingBridge | MaskingBridge | None = None
        if problem.running_cost_function is None:
            with contextlib.suppress(ValueError):
                self.bridge = bridge_of(chain, problem.start)
        kept = 2 if self.bridge is not None else chain.steps + 1
        self.states: Tensor
        self.draws: Tensor
        self.facts: Tensor
        kind = chain.state_dtype or chain.times.dtype
        self.register_buffer("states", chain.times.new_zeros(kept, size, *chain.event_shape, dtype=kind))
        shape = (chain.steps, size, *chain.noise_shape) if self.bridge is None and chain.of_noise else (0,)
        self.register_buffer("draws", chain.times.new_zeros(shape))
        # reward, running cost, KL, objective and its error, log Z, ESS: of the control, when the particles were last
        # run
        self.register_buffer("facts", torch.full((7,), math.nan, dtype=torch.float64, device=chain.times.device))


def _control(run: Run, size: int) -> Control:
    """The user's, or a tuned copy of the model; else a network, beside the control towards a mixture fitted to
    particles where that pays."""
    problem, chain = run.problem, run.chain
    place = derive_seed(run.seed, Place.MATCHING_START)
    base = first_mixture(problem, chain, size, place) if run.control is None else None
    if base is None:
        return build_control(problem, chain, run.control, seed=run.seed)
    return corrected(problem, chain, base, seed=run.seed)


@register
@dataclass(frozen=True)
class ParticleMatching(Method):
    """Forward ``KL(Q_fine || P^u)`` on particles of Q_fine, which are run anew under the learned control every so
    often.

    0. Where the reference has a known bridge to its end (Gibbs problems, memoryless generative references) a mixture of
       Gaussians is fitted to first particles, and the control towards it, known in closed form
       (:class:`MixtureControl`), is the base that a network corrects (``methods/mixture_start.py``); not where the
       control is given, or a trainable model is to be tuned.
    1. Particles are tempered from the paths of the current control to Q_fine (``particles/tempering.py``), in the space
       of their noises, without a gradient of the reward; for a Gibbs problem in the states of the density, from the
       mixture. All modes that they find get their share, however far from the current control.
    2. The control is regressed on ``E[xi_k | x_k, x_K]`` of the reference's bridges to their ends
       (:class:`BridgeMatching`, all weights 1; for a generative reference that forgets its start, the noising process),
       drawn anew in every batch; where no bridge is known (a running cost, a nonlinear reference) on the noises of
       their own paths.

    The better the control, the less is left to temper, so that particles and control improve each other; the fixed
    point is the mean shift of the soft-optimal chain. Nothing pulls the control towards one mode, as the losses of its
    own paths do. Of a corrected mixture the mixture's control alone is kept, unless the correction has lowered the loss
    on new bridges.

    Args:
        num_particles: kept to learn from. refresh: iterations between two runs of the particles.

    Raises:
        ValueError: a problem with conditions.
    """

    num_particles: int = 4096
    refresh: int = 200

    of_noise: ClassVar[bool] = True
    tokens: ClassVar[bool] = True
    default_iterations: ClassVar[int] = 1000
    steady: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("num_particles", self.num_particles, 64)
        check_count("refresh", self.refresh, 1)

    def check(self, problem: ControlProblem) -> None:
        super().check(problem)
        if problem.condition is not None:
            raise ValueError("particle-matching: particles need one target; make a problem with the condition fixed.")

    def setup(self, run: Run) -> nn.Module:
        return _State(run, self.num_particles)

    def step(self, state: _State, run: Run) -> dict[str, float]:
        if run.iteration % self.refresh == 0:
            self.run_particles(state, run)
        chain, means = run.chain, []
        for part in range(run.accumulate):
            if not chain.of_noise:
                states, mean = self.learn_tokens(state, run, part)
                means.append(mean)
                continue
            states, targets = self.draw(state, run, Place.MATCHING_BATCH, part)
            shifts = shifts_along(chain, state.control, states)
            means.append(regress(state, run, shifts, targets))
        mean = torch.stack(means).mean(0)
        state.observe(mean)
        run.descend(Visited.of(states, None))
        reward, cost, kl, objective, error, log_z, ess = state.facts.tolist()
        found = {"objective": objective, "objective_stderr": error, "reward": reward, "running_cost": cost, "kl": kl}
        return {**found, "log_z": log_z, "ess": ess, "loss": float(mean.sum())}

    @torch.no_grad()
    def finish(self, state: _State, run: Run) -> Control:
        """The control; of a corrected mixture the mixture's alone, unless the correction has lowered the loss, which is
        the forward KL up to a constant."""
        control = super().finish(state, run)
        if not isinstance(control, CorrectedControl) or run.control is not None:
            return control
        if not bool(state.states.any()):  # before the first step
            return control.base
        gains = []
        for part in range(_JUDGING):
            states, targets = self.draw(state, run, Place.MATCHING_JUDGE, part)
            with_it, alone = (shifts_along(run.chain, c, states) - targets for c in (control, control.base))
            gains.append((alone.square() - with_it.square()).flatten(2).sum((0, 2)))
        return control if float(torch.cat(gains).mean()) > 0 else control.base

    # ---------------------------------------------------------------- particles

    @torch.no_grad()
    def run_particles(self, state: _State, run: Run) -> None:
        problem, chain, N = run.problem, run.chain, self.num_particles
        seed = derive_seed(run.seed, Place.MATCHING_PARTICLES, run.iteration)
        target = tempered_ends(problem, chain, state.control)
        _, found = adapt(target, N, seed)
        generator = generator_for(chain.times.device, seed, Place.MATCHING_PICK)
        rows = resample(found.log_weights, N, "systematic", generator)[0]
        z, origin = found.z[0, rows], found.origin[0, rows]
        if isinstance(target, NoiseTarget):
            drawn = target.paths(z, origin)
            if state.bridge is None:
                state.states.copy_(drawn.states)
                if chain.of_noise:
                    state.draws.copy_(drawn.noises + drawn.shifts)
            else:
                state.states.copy_(torch.stack((drawn.states[0], drawn.end)))
        else:
            assert isinstance(state.bridge, ChainBridge)
            end = target.states(z)
            noise = torch.randn(end.shape, generator=generator, dtype=end.dtype, device=end.device)
            state.states.copy_(torch.stack((state.bridge.start_given_end(problem.initial, end, noise), end)))
        paths = target if isinstance(target, NoiseTarget) else NoiseTarget(problem, chain, state.control)
        self._observe(state, run, paths, float(found.log_z))

    def _observe(self, state: _State, run: Run, target: NoiseTarget, log_z: float) -> None:
        """How good the control is now, from paths of its own."""
        generator = generator_for(target.device, run.seed, Place.MATCHING_OWN, run.iteration)
        z = torch.randn((run.batch_size, target.dim), generator=generator, dtype=target.dtype, device=target.device)
        place = derive_seed(run.seed, Place.MATCHING_OWN_START, run.iteration)
        paths = target.paths(z, target.draw_origin(run.batch_size, place))
        metrics, log_w = path_metrics([paths]), paths.log_weights()
        ess = float(effective_number(log_w)) / len(log_w)
        names = ("reward", "running_cost", "kl", "objective", "objective_stderr")
        state.facts.copy_(torch.tensor([*(metrics[name] for name in names), log_z, ess], dtype=torch.float64))

    def learn_tokens(self, state: _State, run: Run, part: int) -> tuple[Tensor, Tensor]:
        """Add the gradient of the cross-entropy of tokens: given the ends where the bridges are known, else of the
        steps of whole paths. States of all steps, and the loss of each ``(K,)``."""
        chain = run.chain
        generator = generator_for(chain.times.device, run.seed, Place.MATCHING_TOKENS, run.iteration, part)
        rows = torch.randint(state.states.shape[1], (run.batch_size,), generator=generator, device=chain.times.device)
        if state.bridge is None:
            states = state.states[:-1, rows]
            losses = -chain.log_ratio(shifts_along(chain, state.control, states), state.states[1:, rows])
        else:
            assert isinstance(state.bridge, MaskingBridge)
            start, end = state.states[0, rows], state.states[1, rows]
            noise = torch.randn((1, *end.shape), generator=generator, dtype=chain.times.dtype, device=end.device)
            states = state.bridge.between(start, end, noise)
            losses = state.bridge.misfit(shifts_along(chain, state.control, states), states, end)
        (losses.sum(0).mean() / run.accumulate).backward()
        return states, losses.detach().mean(1)

    def draw(self, state: _State, run: Run, place: Place, part: int) -> tuple[Tensor, Tensor]:
        """States ``(K, batch, *event)`` of paths of Q_fine, and what their noises are given the ends."""
        chain = run.chain
        generator = generator_for(chain.times.device, run.seed, place, run.iteration, part)
        size, device = state.states.shape[1], chain.times.device
        rows = torch.randint(size, (run.batch_size,), generator=generator, device=device)
        if state.bridge is None:
            return state.states[:-1, rows], state.draws[:, rows]
        start, end = state.states[0, rows], state.states[1, rows]
        shape = (chain.steps, *end.shape)
        noise = torch.randn(shape, generator=generator, dtype=end.dtype, device=device)
        assert not isinstance(state.bridge, MaskingBridge)  # its particles are learned from by learn_tokens
        states = state.bridge.between(start, end, noise)
        return states, state.bridge.noise_given_end(states, end)
