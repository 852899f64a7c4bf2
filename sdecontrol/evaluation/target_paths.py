"""Paths of the target, drawn without the control under question, and the control's log weights along them.

A path of the target is an exact draw of it with the reference's bridge before it, since ``dQ_fine/dQ0`` depends on the
end alone; with annealed Langevin dynamics it is the draw run back by the backward kernels, which is what these are for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..chains.annealed import ReversedChain
from ..chains.base import Chain
from ..chains.bridges import ChainBridge
from ..paths.integrator import integrate
from ..paths.paths import Paths
from ..problems.problem import ControlProblem
from ..processes.laws import Dirac, Gaussian
from ..randomness import Place, SeededNoise, derive_seed, generator_for
from ..tensors import is_matrix_scale


def bridged(problem: ControlProblem) -> bool:
    """Whether paths to given ends can be drawn: a Gaussian or point start, no running cost, no conditions."""
    initial = problem.origin
    return (
        problem.running_cost_function is None
        and problem.stop is None
        and problem.condition is None
        and isinstance(initial, (Dirac, Gaussian))
    )


@torch.no_grad()
def weights_to(problem: ControlProblem, chain: Chain, control: Any, ends: Tensor, seed: int) -> Tensor:
    """Log weights ``(n,)`` of a control along paths of the target that end in these draws ``(n, *event)`` of it."""
    end = ends.to(chain.times)
    if chain.reverse is not None:
        return run_backwards(problem, chain, control, end, derive_seed(seed, Place.PATHS_BACKWARDS))
    initial = problem.origin
    bridge, generator = ChainBridge(chain), generator_for(end.device, seed, Place.PATHS_TO_ENDS)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=end.dtype, device=end.device)  # noqa: E731
    start = bridge.start_given_end(initial, end, draw(*end.shape))
    states = bridge.path_given_end(start, end, draw(chain.steps, len(end), *chain.noise_shape))
    return _weights_along(problem, chain, control, states)


@torch.no_grad()
def run_backwards(problem: ControlProblem, chain: Chain, control: Any, ends: Tensor, seed: int) -> Tensor:
    """Log weights of paths of a target made of backward kernels: these draw them from their ends."""
    noise = SeededNoise(
        seed, len(ends), chain.steps, chain.noise_shape, dtype=chain.times.dtype, device=chain.times.device
    )
    paths = integrate(ReversedChain(chain, control), ends, noise)
    return _weights_along(problem, chain, control, paths.states.flip(0))


def _weights_along(problem: ControlProblem, chain: Chain, control: Any, states: Tensor) -> Tensor:
    """``log w`` of stored whole paths, ``(batch,)``: the draws that made them under the reference, and the control's
    shifts."""
    found = []
    for k in range(chain.steps):
        mean, scale = chain.kernel(k, states[k])
        rest = states[k + 1] - mean
        if is_matrix_scale(scale, chain.event_ndim):
            found.append(
                torch.linalg.lstsq(scale.expand(len(rest), *scale.shape[1:]), rest.unsqueeze(2)).solution[..., 0]
            )
        else:
            found.append(rest / scale)
    return Paths.of_states(chain, states, torch.stack(found)).towards(problem).log_weights(control).double()
