"""``ParticleMatching``: particles find the target, bridges to them teach the control, and the control moves the next
particles."""

import math
from collections.abc import Callable
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

_BLOCKS, _COMPARED = 16, 1024  # of particles by which two controls are compared; particles at least, if there are


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

    New particles say what the iterations since the last ones have gained: by how much the loss on bridges to them has
    fallen, in nats of the forward KL ("gain" in the history). A run without a number of iterations ends where that is
    not worth it (:func:`solve`), or particles differ from the last ones by no more than that.

    Args:
        num_particles: kept to learn from. refresh: iterations between two runs of the particles; the second one comes
            after half as many.
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
    measures_gain: ClassVar[bool] = True

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
        gained = self._renew(state, run) if self._due(run.iteration) else {}
        loss, states = (self._plain if state.anchor is None else self._anchored)(state, run)
        run.descend(Visited.of(states, None))
        reward, cost, kl, objective, error, log_z, ess = state.facts.tolist()
        found = {"objective": objective, "objective_stderr": error, "reward": reward, "running_cost": cost, "kl": kl}
        return {**found, "log_z": log_z, "ess": ess, "loss": loss, **gained}

    def _due(self, i: int) -> bool:
        return i % self.refresh == 0 or 2 * i == self.refresh

    def _renew(self, state: TargetParticles, run: Run) -> dict[str, float]:
        """New particles, and what they say of the iterations since the last ones."""
        state.renew(run)
        gain = self.gains(state, run, state.last, state.control, Place.MATCHING_GAIN) if run.iteration else None
        state.last.load_state_dict(state.control.state_dict())
        if gain is None:
            return {}
        return {"gain": float(gain.mean()), "gain_stderr": float(gain.std()) / math.sqrt(len(gain))}

    def _plain(self, state: TargetParticles, run: Run) -> tuple[float, Tensor]:
        """Add the gradients of all parts; their loss, and states of all steps."""
        means = []
        for part in range(run.accumulate):
            if run.chain.of_noise:
                states, targets = self.draw(state, run, Place.MATCHING_BATCH, part)
                means.append(regress(state, run, shifts_along(run.chain, state.control, states), targets))
            else:
                rows, generator = _rows(state, run, Place.MATCHING_TOKENS, part)
                states, losses = _tokens(state, run, rows, generator)
                each = losses(state.control)
                (each.sum(0).mean() / run.accumulate).backward()
                means.append(each.detach().mean(1))
        mean = torch.stack(means).mean(0)
        state.observe(mean)
        return float(mean.sum()), states

    def _anchored(self, state: TargetParticles, run: Run) -> tuple[float, Tensor]:
        """The same on particles and untuned ends, some of the steps."""
        loss = 0.0
        for part in range(run.accumulate):
            rows, generator = _rows(state, run, Place.MATCHING_ANCHORED, part)
            noised, targets, w, rho = self._weighted(state, run, rows, generator, part)
            loss += regress_both(state, run, noised, targets, w, rho) / run.accumulate
        shape = (run.chain.steps, *noised.end.shape)
        noise = torch.randn(shape, generator=generator, dtype=noised.z.dtype, device=noised.z.device)
        start = state.states[0, rows]
        return loss, noised.bridge.between(start, noised.end, noise)

    def _weighted(
        self, state: TargetParticles, run: Run, rows: Tensor, generator: torch.Generator, part: int
    ) -> tuple[Noised, Tensor, Tensor, Tensor]:
        """Some ends, noised anew at some steps, their targets, and their weights towards Q_fine and the model."""
        ends = Ends(state.states[0, rows], state.states[1, rows])
        noised = Noised(state, run, ends, generator, steps_of(run, self.steps, part))
        log_ratio = state.log_ratios[rows]
        targets = anchored_target(noised.z, noised.a.detach(), log_ratio)
        return noised, targets, 2 * log_ratio.sigmoid(), 2 * (-log_ratio).sigmoid()

    @torch.no_grad()
    def gains(self, state: TargetParticles, run: Run, before: Control, after: Control, place: Place) -> Tensor:
        """By how much ``after`` has less forward KL than ``before`` on new bridges to particles, in nats: means of 16
        blocks that are far from one another, since particles of one ancestor are neighbours."""
        found = []
        for part, block in enumerate(torch.arange(state.size, device=run.chain.times.device).chunk(_BLOCKS)):
            rows = block[: max(1, _COMPARED // _BLOCKS)]
            generator = generator_for(rows.device, run.seed, place, run.iteration, part)
            loss = self._losses(state, run, rows, generator, part)
            found.append((loss(before) - loss(after)).mean())
        return torch.stack(found).double()

    def _losses(
        self, state: TargetParticles, run: Run, rows: Tensor, generator: torch.Generator, part: int
    ) -> Callable[[Control], Tensor]:
        """``control -> loss`` of some particles, ``(batch,)``, in nats."""
        chain = run.chain
        if state.anchor is not None:
            both = torch.cat((rows, rows + state.size))
            noised, targets, w, _ = self._weighted(state, run, both, generator, part)
            return lambda c: (w * noised.half_square(noised.shifts(c) - targets)).sum(0) * noised.share
        if not chain.of_noise:
            losses = _tokens(state, run, rows, generator)[1]
            return lambda c: losses(c).sum(0)
        states, targets = _bridges(state, run, rows, generator)
        return lambda c: 0.5 * (shifts_along(chain, c, states) - targets).square().flatten(2).sum((0, 2))

    @torch.no_grad()
    def finish(self, state: TargetParticles, run: Run) -> Control:
        """The control; of a corrected mixture the mixture's alone, unless the correction has lowered the loss, which is
        the forward KL up to a constant."""
        control = super().finish(state, run)
        if not isinstance(control, CorrectedControl) or run.control is not None:
            return control
        if not bool(state.states.any()):  # before the first step
            return control.base
        gain = self.gains(state, run, control.base, control, Place.MATCHING_JUDGE)
        return control if float(gain.mean()) > 0 else control.base

    def draw(self, state: TargetParticles, run: Run, place: Place, part: int) -> tuple[Tensor, Tensor]:
        """States ``(K, batch, *event)`` of paths of Q_fine, and what their noises are given the ends, less the
        anchor."""
        return _bridges(state, run, *_rows(state, run, place, part, state.size))


def _bridges(state: TargetParticles, run: Run, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same of some particles."""
    if state.bridge is None:
        return state.states[:-1, rows], state.draws[:, rows]
    start, end = state.states[0, rows], state.states[1, rows]
    shape = (run.chain.steps, *end.shape)
    noise = torch.randn(shape, generator=generator, dtype=end.dtype, device=end.device)
    assert not isinstance(state.bridge, MaskingBridge)  # its particles are learned from by _tokens
    states = state.bridge.between(start, end, noise)
    targets = state.bridge.noise_given_end(states, end)
    return states, targets if state.anchor is None else targets - shifts_along(run.chain, state.anchor, states)


def _tokens(
    state: TargetParticles, run: Run, rows: Tensor, generator: torch.Generator
) -> tuple[Tensor, Callable[[Control], Tensor]]:
    """States of all steps of some particles, and ``control -> loss (K, batch)``: the cross-entropy of tokens given the
    ends where the bridges are known, else of the steps of whole paths."""
    chain, bridge = run.chain, state.bridge
    if bridge is None:
        states, later = state.states[:-1, rows], state.states[1:, rows]
        return states, lambda c: -chain.log_ratio(shifts_along(chain, c, states), later)
    assert isinstance(bridge, MaskingBridge)
    start, end = state.states[0, rows], state.states[1, rows]
    noise = torch.randn((1, *end.shape), generator=generator, dtype=chain.times.dtype, device=end.device)
    states = bridge.between(start, end, noise)
    return states, lambda c: bridge.misfit(shifts_along(chain, c, states), states, end)


def _rows(
    state: TargetParticles, run: Run, place: Place, part: int, among: int | None = None
) -> tuple[Tensor, torch.Generator]:
    """Of the stored ends at random, or of the first ones, and the generator that drew them."""
    device, among = run.chain.times.device, among or state.states.shape[1]
    generator = generator_for(device, run.seed, place, run.iteration, part)
    return torch.randint(among, (run.batch_size,), generator=generator, device=device), generator
