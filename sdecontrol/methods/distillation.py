"""``Distillation``: regression of a control on another one's shifts, along stored paths. Users call ``sc.distill``."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..chains.shifts import shift_function, shifts_along
from ..controls.base import Control
from ..controls.build import build_control
from ..errors import check_name
from ..problems.simulate import simulate_chain
from ..processes.modules import copied
from ..randomness import Place, derive_seed, generator_for
from .base import METRICS, ControlState, Method, Run, Visited, few_of

PATHS = ("teacher", "student", "both")
_MOST_PATHS, _MOST_BYTES = 2048, 2**30  # of a round
_STEPS = 8  # whose states one gradient sees
_USES = 1.25  # of a stored state on average


class DistillationState(ControlState):
    """The student, what it was when the round's paths were drawn, and these paths: ``(K, N, *event)`` states, the
    teacher's shifts there, and conditions. Paths are no part of a checkpoint: a seed draws them again."""

    def __init__(self, control: Control, teacher: Control) -> None:
        super().__init__(control)
        self.behaviour = copied(control).requires_grad_(False)
        self.teacher = [teacher]  # in a list: it is not trained
        self.round = -1
        self.stored: tuple[Tensor, Tensor, Any] | None = None


@dataclass(frozen=True)
class Distillation(Method):
    """Minimise ``E sum_k |c_k - teacher's c_k|^2/2`` along paths of the teacher, of the student, or half of each.

    On the teacher's paths it is KL(P^teacher || P^student), on the student's KL(P^student || P^teacher), both exact for
    the chain; ``loss`` in the history estimates it, without the teacher's noise: it is 0 where the two agree. Paths are
    drawn in rounds, and each of their states is used about once.

    Args:
        teacher: the control that is learned.
        paths: "teacher"; "student": the states that the student itself comes to (Ross et al. 1011.0686); "both": half
            of each, so that the student learns to come back.
        num_paths: of one round; None: 2048, or as many as 1 GiB holds.
    """

    teacher: Control
    paths: str = "both"
    num_paths: int | None = None

    default_iterations: ClassVar[int] = 10_000
    residual: ClassVar[bool] = True
    estimates: ClassVar[str | None] = "loss"
    of_noise: ClassVar[bool] = True
    reference_steps: ClassVar[bool] = False
    fixed_target: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_name("paths", self.paths, PATHS)

    def setup(self, run: Run) -> nn.Module:
        return DistillationState(build_control(run.problem, run.chain, run.control, seed=run.seed), self.teacher)

    def step(self, state: Any, run: Run) -> dict[str, float]:
        count = self.num_paths or _fitting(run)
        length = max(1, round(_USES * count * run.chain.steps / (run.batch_size * run.accumulate)))
        if run.iteration // length != state.round:
            self._draw(state, run, run.iteration // length, run.iteration % length == 0, count)
        loss = 0.0
        for part in range(run.accumulate):
            generator = generator_for("cpu", run.seed, Place.DISTILLED_STATES, run.iteration, part)
            loss += self._learn(state, run, generator) / run.accumulate
        run.descend(self._visited(state, run))
        return {**dict.fromkeys(METRICS, math.nan), "loss": loss}

    def _visited(self, state: Any, run: Run) -> Visited:
        """A few of the stored paths, others each time."""
        states, _, y = state.stored
        generator = generator_for("cpu", run.seed, Place.DISTILLED_VISITED, run.iteration)
        few = min(few_of(run.batch_size), states.shape[1])
        rows = torch.randint(states.shape[1], (few,), generator=generator).to(states.device)
        return Visited(states[:, rows], None if y is None else y[rows])

    @torch.no_grad()
    def _draw(self, state: Any, run: Run, number: int, new: bool, count: int) -> None:
        """The paths of a round."""
        if new:  # else a run is resumed within the round
            state.behaviour.load_state_dict(state.control.state_dict())
        teacher, found = state.teacher[0], []
        for part, begin in enumerate(range(0, count, run.batch_size)):
            n = min(run.batch_size, count - begin)
            own = self.paths == "student" or (self.paths == "both" and part % 2 == 1)
            seed = derive_seed(run.seed, Place.DISTILLED_PATHS, number, part)
            paths = simulate_chain(run.problem, run.chain, n, state.behaviour if own else teacher, seed=seed)
            states = paths.states[:-1]
            shifts = shifts_along(run.chain, teacher, states, paths.condition) if own else paths.shifts
            found.append((states, shifts, paths.condition))
        states, shifts, conditions = zip(*found)
        y = None if conditions[0] is None else torch.cat(conditions)
        state.stored, state.round = (torch.cat(states, 1), torch.cat(shifts, 1), y), number

    def _learn(self, state: Any, run: Run, generator: torch.Generator) -> float:
        """Add the gradient at stored states of some steps, one from each part of the grid."""
        states, shifts, y = state.stored
        total, count = len(states), min(_STEPS, len(states))
        edges = [total * i // count for i in range(count + 1)]
        student, loss = shift_function(run.chain, state.control), states.new_zeros(())
        each = max(1, run.batch_size // count)
        for a, b in pairwise(edges):
            k = a + int(torch.randint(b - a, (), generator=generator))
            rows = torch.randint(states.shape[1], (each,), generator=generator).to(states.device)
            c = student(k, states[k, rows], None if y is None else y[rows])
            loss = loss + (c - shifts[k, rows]).flatten(1).square().sum(1).mean() * (0.5 * (b - a))
        (loss / run.accumulate).backward()
        return float(loss.detach())


def _fitting(run: Run) -> int:
    chain = run.chain
    numbers = chain.steps * (chain.reference.event_shape.numel() + chain.noise_shape.numel())
    room = _MOST_BYTES // (numbers * chain.times.element_size())
    return max(1, min(_MOST_PATHS, room))
