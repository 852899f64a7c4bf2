"""The reciprocal form of adjoint matching: adjoint sampling (Havens et al. 2504.11713), on the chain's own bridges."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..chains.bridges import ChainBridge
from ..chains.shifts import shifts_along
from ..paths.lean_adjoint import StepJacobians, lean_targets
from ..paths.paths import Paths
from ..problems.problem import ControlProblem
from ..randomness import Place, generator_for
from .base import METRICS, Run, path_metrics
from .regression import RegressionState, controlled_paths, descend, regress


class EndBuffer(RegressionState):
    """Starts, ends and reward slopes of the last ``size`` paths, between which the reference's bridges are drawn."""

    def __init__(self, run: Run, size: int) -> None:
        super().__init__(run)
        self.bridge, chain = ChainBridge(run.chain), run.chain
        self.starts: Tensor
        self.ends: Tensor
        self.slopes: Tensor
        self.count: Tensor
        self.metrics: Tensor
        for name in ("starts", "ends", "slopes"):
            self.register_buffer(name, chain.times.new_zeros(size, *chain.event_shape))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("metrics", torch.full((5,), math.nan, dtype=torch.float64))

    def add(self, paths: Paths, slope: Tensor) -> None:
        size = len(self.starts)
        where = (torch.arange(len(slope), device=slope.device) + int(self.count)) % size
        for buffer, rows in ((self.starts, paths.states[0]), (self.ends, paths.end), (self.slopes, slope)):
            buffer.index_copy_(0, where, rows)
        self.count += len(slope)


def reciprocal_step(
    state: EndBuffer, run: Run, refresh: int, clip: float | None, own_step: bool, steps: Sequence[int] | None
) -> dict[str, float]:
    """One iteration: new ends now and then, and a regression on bridges to stored ones, whose slopes were computed
    once.

    Args:
        refresh, clip: as of ``AdjointMatching``; own_step: as of ``lean_targets``; steps: to regress on, None: all.
    """
    problem, chain = run.problem, run.chain
    if run.iteration % refresh == 0:
        paths, slope = controlled_paths(state, run)
        state.add(paths, clipped(problem, slope, clip))
        found = path_metrics([paths])
        state.metrics.copy_(torch.tensor([found[name] for name in METRICS], dtype=torch.float64))
    generator = generator_for(chain.times.device, run.seed, Place.RECIPROCAL, run.iteration)
    stored = min(int(state.count), len(state.starts))
    rows = torch.randint(stored, (run.batch_size,), generator=generator, device=generator.device)
    end = state.ends[rows]
    noise = torch.randn((chain.steps, *end.shape), dtype=end.dtype, generator=generator, device=end.device)
    states = torch.cat((state.bridge.between(state.starts[rows], end, noise), end.unsqueeze(0)))
    drawn = Paths.of_states(chain, states)
    targets = lean_targets(StepJacobians(drawn), state.slopes[rows], own_step=own_step)
    shifts = shifts_along(chain, state.control, states[:-1])
    loss = descend(state, run, [drawn], [regress(state, run, shifts, targets, steps=steps)])
    return {**dict(zip(METRICS, state.metrics.tolist())), "loss": loss}


def clipped(problem: ControlProblem, slope: Tensor, clip: float | None) -> Tensor:
    """On a Gibbs problem, no slope longer than so many times its usual size."""
    if clip is None or problem.density is None:
        return slope
    size = (problem.scale * slope).norm(dim=1, keepdim=True)
    bound = clip * problem.roughness * problem.dim**0.5
    # a slope that is not finite says nothing but that the path has gone too far
    return (slope * (bound / size).clamp(max=1.0)).nan_to_num(0.0, 0.0, 0.0)
