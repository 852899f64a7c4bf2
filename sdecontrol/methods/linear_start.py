"""Where a control may begin: linear-quadratic regulation of the linearised problem.

A drift that is unstable takes the reference's paths exponentially far from where the optimal ones are, and what is
learned there says little of what is needed. The regulator of an affine fit to the steps, with quadratic fits to reward
and running cost, keeps them together. Fits are made along paths of the last regulator until that gains no more
(iterated statistical linearisation); on a linear-quadratic problem the first is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..chains.base import AffineStep, Chain
from ..controls.feedback import AffineFeedback
from ..errors import NoExactSolution, NonFiniteError
from ..exact.discrete import shift_step
from ..exact.quadratic import Form
from ..paths.closed_loop import affine_fit
from ..paths.lean_adjoint import running_cost_gradients
from ..paths.paths import Paths
from ..problems.problem import ControlProblem
from ..problems.simulate import simulate_chain
from ..problems.slope import reward_slope
from ..randomness import Place, derive_seed
from ..tensors import apply_scale, symmetric

_LARGEST = 128  # numbers in a state
_GROWTH = 10.0  # of a small disturbance until the end, from which a drift is unstable
_PATHS = 256  # at least; and four times as many as coordinates
_ROUNDS = 8
_GAIN = 0.01  # of the objective, relative, below which rounds end


def linear_start(problem: ControlProblem, chain: Chain, seed: int) -> AffineFeedback | None:
    """A regulator that does better than no control where the drift is unstable; None where it is not (a disturbance
    grows less than tenfold until the end), or where none is found."""
    if not _applies(problem, chain):
        return None
    n = max(_PATHS, 4 * chain.event_shape.numel())
    best: AffineFeedback | None = None
    try:
        paths = simulate_chain(problem, chain, n, seed=derive_seed(seed, Place.LINEAR_START))
        steps = _affine_steps(paths)
        if _growth(steps) < _GROWTH:
            return None
        score = _objective(paths)
        for index in range(_ROUNDS):
            tried = _regulator(problem, paths, steps)
            place = derive_seed(seed, Place.LINEAR_START_ROUND, index)
            paths = simulate_chain(problem, chain, n, tried, seed=place)
            found, before = _objective(paths), score
            if not found > score:
                break
            best, score = tried, found
            if found - before < _GAIN * abs(before):
                break
            steps = _affine_steps(paths)
    except (NonFiniteError, NoExactSolution):  # the last round that was finite
        return best
    return best


def _applies(problem: ControlProblem, chain: Chain) -> bool:
    reference = problem.reference
    return (
        chain.gaussian
        and len(chain.event_shape) == 1
        and chain.event_shape.numel() <= _LARGEST
        and problem.has_gradient
        and problem.density is None
        and not (chain.start or reference.pretrained or reference.tangential)
        and problem.condition is None
        and problem.stop is None
    )


def _objective(paths: Paths) -> float:
    return float((paths.reward - paths.cost - paths.alpha * paths.kl()).double().mean())


@torch.no_grad()
def _affine_steps(paths: Paths) -> list[AffineStep]:
    """The chain's steps where they are affine; else their best affine fits along the paths, with the mean of their
    scales."""
    chain = paths.chain
    known = chain.affine_steps()
    if known is not None:
        eye = torch.eye(chain.noise_shape.numel(), dtype=torch.float64)
        return [step._replace(gain=eye) for step in known]
    states, means, scales = paths.states[:-1], [], []
    units = torch.eye(chain.noise_shape.numel()).to(states)
    for k, x in enumerate(states):
        mean, scale = chain.kernel(k, x)
        means.append(mean)
        columns = [apply_scale(scale, unit.expand(len(x), -1), 1).mean(0) for unit in units]
        scales.append(torch.stack(columns, 1).double().cpu())
    moves, offsets = affine_fit(states, torch.stack(means) - states)
    eye = torch.eye(moves.shape[1], dtype=moves.dtype, device=moves.device)
    steps = zip((moves + eye).cpu(), offsets.cpu(), scales)
    return [AffineStep(matrix, shift, scale, units.double().cpu()) for matrix, shift, scale in steps]


def _growth(steps: list[AffineStep]) -> float:
    """Of the disturbance that grows most until the end, whenever it comes."""
    whole, most = torch.eye(len(steps[0].matrix), dtype=torch.float64), 1.0
    for step in reversed(steps):
        whole = whole @ step.matrix
        most = max(most, float(torch.linalg.matrix_norm(whole, 2)))
    return most


def _regulator(problem: ControlProblem, paths: Paths, steps: list[AffineStep]) -> AffineFeedback:
    """The best control of affine steps and quadratic costs, fitted to slopes along the paths."""
    chain, alpha = paths.chain, problem.alpha
    _, slope = reward_slope(problem, paths)
    form = _concave(*affine_fit(paths.states[-1:], slope.unsqueeze(0)))[0]
    costs = running_cost_gradients(paths, problem.running_cost_or_none)
    each = None if costs is None else _concave(*affine_fit(paths.states[:-1], -costs / alpha))
    gains, offsets = [], []
    for k in reversed(range(chain.steps)):
        form, (gain, offset) = shift_step(form, steps[k], f"at step {k} of {chain.steps}")
        if each is not None:
            h = chain.step_sizes[k]
            form = form._replace(P=form.P + h * each[k].P, q=form.q + h * each[k].q)
        gains.append(gain)
        offsets.append(offset)
    return AffineFeedback(torch.stack(gains[::-1]), torch.stack(offsets[::-1]))


def _concave(slopes: Tensor, offsets: Tensor) -> list[Form]:
    """Forms with the gradients ``slopes x + offsets``, their convex parts left out: a regulator need not exist with
    them."""
    values, vectors = torch.linalg.eigh(symmetric(-slopes.cpu()))
    P = vectors @ (values.clamp(min=0).unsqueeze(2) * vectors.mT)
    zero = P.new_zeros(())
    return [Form(matrix, shift, zero) for matrix, shift in zip(P, offsets.cpu())]
