"""A mixture of Gaussians learned from particles, as the beginning of a control: what regression then has to correct is
little."""

import math

import torch
from torch import Tensor

from ..chains.base import Chain
from ..controls.base import Control
from ..controls.ends import Ends, ends_of
from ..controls.mixture import MixtureControl
from ..evaluation.tempered_solution import TemperedSettings, tempered_target
from ..particles.ascent import adapt
from ..particles.mixture_fit import fit_mixture
from ..particles.tempering import NoiseTarget, StateTarget, start_points
from ..paths.weights import effective_number
from ..problems.problem import ControlProblem
from ..randomness import Place, derive_seed

_FIRST = 4  # the first particles' part: they only have to find the modes
_DRAWS = 8  # times ``size``: independent draws for the last mixture
_LARGEST = 1024  # numbers in a state to which a mixture is fitted


def ends_for_a_mixture(problem: ControlProblem) -> Ends | None:
    """The reference's end, where a mixture can stand in its place; None: a running cost counts beside the end, the
    state is too large, a trainable model is to be tuned itself, or no such control is known."""
    large = problem.event_shape.numel() > _LARGEST
    if problem.running_cost_function is not None or large or problem.reference.trainable:
        return None
    try:
        return ends_of(problem)
    except TypeError:
        return None


@torch.no_grad()
def first_mixture(problem: ControlProblem, chain: Chain, size: int, seed: int) -> MixtureControl | None:
    """The control towards a mixture fitted to the ends of particles, in three steps that each begin with the mixture
    before.

    A quarter of ``size`` are tempered from the reference and find the modes; ``size`` tempered from the first mixture
    find their shares; and eight times as many independent draws that begin with the second one, weighted, say more of
    all that than any of them could by moving, if their weights are even enough.

    Returns:
        None where there is no such control (:func:`ends_for_a_mixture`), or the first mixture saves no evaluations.
    """
    ends = ends_for_a_mixture(problem)
    if ends is None:
        return None
    control, work = None, math.inf
    for part, n in enumerate((max(64, size // _FIRST), size)):
        with problem.evaluating():
            target = tempered_ends(problem, chain, control)
            _, found = adapt(target, n, derive_seed(seed, Place.FIRST_MIXTURE, part))
            end = _ends(target, found.z[0], found.origin[0])
        if found.evaluations / n >= work:
            return None
        place = derive_seed(seed, Place.FIRST_MIXTURE_FIT, part)
        law = fit_mixture(ends.standardised(end), found.log_weights[0], seed=place)
        control, work = MixtureControl(problem, law), found.evaluations / n
    with problem.evaluating():
        end, log_w = weighted_ends(tempered_ends(problem, chain, control), size, seed)
    if float(effective_number(log_w)) > size:
        place = derive_seed(seed, Place.FIRST_MIXTURE_LAST_FIT)
        control = MixtureControl(problem, fit_mixture(ends.standardised(end), log_w, seed=place))
    return control


def tempered_ends(problem: ControlProblem, chain: Chain, control: Control | None) -> StateTarget | NoiseTarget:
    """Where particles are tempered to the ends of Q_fine: the states of a density, from the mixture where there is one;
    else the noises of paths, without a gradient."""
    if problem.density is None:
        return tempered_target(problem, chain, control, TemperedSettings("noises", False))
    base = getattr(control, "base", control)
    mixture = isinstance(base, MixtureControl)
    settings = TemperedSettings("states", problem.has_gradient, mixture=mixture)
    return tempered_target(problem, chain, base if mixture else None, settings)


def weighted_ends(target: StateTarget | NoiseTarget, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ends of independent draws of what particles begin with, and their log weights."""
    drawn = [start_points(target, size, derive_seed(seed, Place.FIRST_MIXTURE_DRAWS, block)) for block in range(_DRAWS)]
    return torch.cat([_ends(target, p.z, p.origin) for p in drawn]), torch.cat([p.phi.double() for p in drawn])


def _ends(target: StateTarget | NoiseTarget, z: Tensor, origin: Tensor) -> Tensor:
    return target.states(z) if isinstance(target, StateTarget) else target.paths(z, origin, keep="end").end
