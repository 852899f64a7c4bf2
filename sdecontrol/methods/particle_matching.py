"""``ParticleMatching``: particles find the target, bridges to them teach the control, and the control moves the next
particles."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..chains.masking import MaskingBridge
from ..chains.shifts import shifts_along
from ..controls.base import Control
from ..controls.mixture import CorrectedControl
from ..problems.problem import ControlProblem
from ..randomness import Place, generator_for
from ..tensors import check_count
from .base import Method, Run, Visited, register
from .forward_process import Ends, Noised, anchored_target, regress_both
from .on_paths import steps_of
from .regression import regress
from .target_particles import TargetParticles

_JUDGING = 8  # batches of new bridges on which a correction is judged


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

    A pre-trained model that is tuned itself is anchored as in :class:`BridgeMatching`, on as many ends of the untuned
    model beside the particles: relative to the mixture of both no weight exceeds 2. Equal rewards then leave the model
    as it is, where the plain form pays for the difference between it and the denoiser of its own samples.

    Args:
        num_particles: kept to learn from. refresh: iterations between two runs of the particles.
        anchor: False: the plain form on a pre-trained model too.
        steps: of a pre-trained model that is anchored, regress on so many randomly drawn steps (unbiased); None: all.

    Raises:
        ValueError: a problem with conditions.
    """

    num_particles: int = 4096
    refresh: int = 200
    anchor: bool = True
    steps: int | None = None

    of_noise: ClassVar[bool] = True
    zero_weights: ClassVar[bool] = True
    tokens: ClassVar[bool] = True
    default_iterations: ClassVar[int] = 1000
    steady: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("num_particles", self.num_particles, 64)
        check_count("refresh", self.refresh, 1)
        check_count("steps", self.steps, 1, optional=True)

    def check(self, problem: ControlProblem) -> None:
        super().check(problem)
        if problem.condition is not None:
            raise ValueError("particle-matching: particles need one target; make a problem with the condition fixed.")

    def setup(self, run: Run) -> nn.Module:
        return TargetParticles(run, self.num_particles, self.anchor)

    def step(self, state: TargetParticles, run: Run) -> dict[str, float]:
        if run.iteration % self.refresh == 0:
            state.renew(run)
        loss, states = (self._plain if state.anchor is None else self._anchored)(state, run)
        run.descend(Visited.of(states, None))
        reward, cost, kl, objective, error, log_z, ess = state.facts.tolist()
        found = {"objective": objective, "objective_stderr": error, "reward": reward, "running_cost": cost, "kl": kl}
        return {**found, "log_z": log_z, "ess": ess, "loss": loss}

    def _plain(self, state: TargetParticles, run: Run) -> tuple[float, Tensor]:
        """Add the gradients of all parts; their loss, and states of all steps."""
        means = []
        for part in range(run.accumulate):
            if run.chain.of_noise:
                states, targets = self.draw(state, run, Place.MATCHING_BATCH, part)
                means.append(regress(state, run, shifts_along(run.chain, state.control, states), targets))
            else:
                states, mean = self.learn_tokens(state, run, part)
                means.append(mean)
        mean = torch.stack(means).mean(0)
        state.observe(mean)
        return float(mean.sum()), states

    def _anchored(self, state: TargetParticles, run: Run) -> tuple[float, Tensor]:
        """The same on particles and untuned ends, some of the steps."""
        loss = 0.0
        for part in range(run.accumulate):
            rows, generator = _rows(state, run, Place.MATCHING_ANCHORED, part)
            ends = Ends(state.states[0, rows], state.states[1, rows])
            noised = Noised(state, run, ends, generator, steps_of(run, self.steps, part))
            log_ratio = state.log_ratios[rows]
            w, rho = 2 * log_ratio.sigmoid(), 2 * (-log_ratio).sigmoid()
            targets = anchored_target(noised.z, noised.a.detach(), log_ratio)
            loss += regress_both(state, run, noised, targets, w, rho) / run.accumulate
        shape = (run.chain.steps, *noised.end.shape)
        noise = torch.randn(shape, generator=generator, dtype=noised.z.dtype, device=noised.z.device)
        return loss, noised.bridge.between(ends.start, ends.end, noise)

    @torch.no_grad()
    def finish(self, state: TargetParticles, run: Run) -> Control:
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

    def learn_tokens(self, state: TargetParticles, run: Run, part: int) -> tuple[Tensor, Tensor]:
        """Add the gradient of the cross-entropy of tokens: given the ends where the bridges are known, else of the
        steps of whole paths. States of all steps, and the loss of each ``(K,)``."""
        chain = run.chain
        rows, generator = _rows(state, run, Place.MATCHING_TOKENS, part)
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

    def draw(self, state: TargetParticles, run: Run, place: Place, part: int) -> tuple[Tensor, Tensor]:
        """States ``(K, batch, *event)`` of paths of Q_fine, and what their noises are given the ends, less the
        anchor."""
        rows, generator = _rows(state, run, place, part, state.size)
        if state.bridge is None:
            return state.states[:-1, rows], state.draws[:, rows]
        start, end = state.states[0, rows], state.states[1, rows]
        shape = (run.chain.steps, *end.shape)
        noise = torch.randn(shape, generator=generator, dtype=end.dtype, device=end.device)
        assert not isinstance(state.bridge, MaskingBridge)  # its particles are learned from by learn_tokens
        states = state.bridge.between(start, end, noise)
        targets = state.bridge.noise_given_end(states, end)
        return states, targets if state.anchor is None else targets - shifts_along(run.chain, state.anchor, states)


def _rows(
    state: TargetParticles, run: Run, place: Place, part: int, among: int | None = None
) -> tuple[Tensor, torch.Generator]:
    """Of the stored ends at random, or of the first ones, and the generator that drew them."""
    device, among = run.chain.times.device, among or state.states.shape[1]
    generator = generator_for(device, run.seed, place, run.iteration, part)
    return torch.randint(among, (run.batch_size,), generator=generator, device=device), generator
