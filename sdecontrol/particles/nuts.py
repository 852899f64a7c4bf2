"""The no-U-turn sampler (Hoffman & Gelman 1111.4246) of pyro-ppl, on the coordinates of a :class:`StateTarget`: one
chain after another.

Step size and mass matrix of each chain are adapted in its warm-up as Stan does, and frozen. Installed by the extra
``sdecontrol[mcmc]``, imported when used.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..precision import full_precision
from ..randomness import Place, derive_seed, global_rng
from .markov import Draws, WarmChains, finite_starts
from .tempering import StateTarget, points_at

_FULL_COVARIANCE = 64  # largest dimension with a whole mass matrix
_SITE = "z"


def import_nuts() -> Any:
    """pyro's kernel class.

    Raises:
        ModuleNotFoundError: it is not installed; names the extra.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from pyro.infer.mcmc import NUTS  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("the method 'nuts' needs pyro-ppl: pip install 'sdecontrol[mcmc]'.") from error
    return NUTS


@contextlib.contextmanager
def _undisturbed(device: torch.device, seed: int, place: Place, chain: int) -> Iterator[None]:
    """pyro draws from torch's global generator and warns of its own affairs."""
    with warnings.catch_warnings(), global_rng(device, seed, place, chain):
        warnings.filterwarnings("ignore", module="pyro")
        yield


class _Potential:
    """``-log`` of the density of the coordinates, up to a constant, one state at a time."""

    def __init__(self, target: StateTarget) -> None:
        self.target, self.origin, self.calls = target, target.draw_origin(1, 0), 0

    def __call__(self, sites: dict[str, Tensor]) -> Tensor:
        self.calls += 1
        return _Energy.apply(sites[_SITE], self)  # type: ignore[no-any-return]


class _Energy(torch.autograd.Function):
    """Value and gradient from one evaluation with the checks of :func:`points_at`; inf, with a gradient of 0, where the
    density vanishes."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, potential: _Potential) -> Tensor:  # type: ignore[override]
        p = points_at(potential.target, z.unsqueeze(0), potential.origin)
        ctx.save_for_backward(z - p.slope[0])
        return 0.5 * z.square().sum() - p.phi[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return gradient * ctx.saved_tensors[0], None


def warm_up_nuts(
    target: StateTarget, chains: int, iterations: int, seed: int, depth: int, thin: int | None = None
) -> tuple[WarmChains, int]:
    """As :func:`warm_up_chains`, each chain with a step size and mass matrix of its own; ``depth``: of the trees at
    most."""
    nuts = import_nuts()
    starts = finite_starts(target, chains, derive_seed(seed, Place.NUTS_WARM_UP_POINTS))
    potential, states, steps, masses = _Potential(target), [], [], []
    for m in range(chains):
        with _undisturbed(target.device, seed, Place.NUTS_WARM_UP, m):
            kernel = nuts(potential_fn=potential, full_mass=target.dim <= _FULL_COVARIANCE, max_tree_depth=depth)
            kernel.initial_params = {_SITE: starts.z[m].clone()}
            kernel.setup(iterations)
            state = kernel.initial_params
            for _ in range(iterations):
                state = kernel.sample(state)
        states.append(state[_SITE].detach())
        steps.append(kernel.step_size)
        masses.append(kernel.inverse_mass_matrix[(_SITE,)].detach())
    warm = WarmChains(
        torch.stack(states),
        torch.tensor(steps, dtype=torch.float64),
        starts.z.new_zeros(0),
        torch.stack(masses),
        torch.tensor(0),
        torch.tensor(1 if thin is None else thin),
    )
    return warm, chains + potential.calls


@full_precision()
def run_nuts(target: StateTarget, warm: WarmChains, draws: int, seed: int, depth: int) -> Draws:
    """As :func:`run_chains`."""
    nuts = import_nuts()
    potential, z, phi = _Potential(target), [], []
    for m, start in enumerate(warm.states):
        with _undisturbed(target.device, seed, Place.NUTS, m):
            kernel = nuts(
                potential_fn=potential,
                step_size=float(warm.step_size[m]),
                adapt_step_size=False,
                adapt_mass_matrix=False,
                full_mass=warm.factor.ndim == 3,
                max_tree_depth=depth,
            )
            kernel.initial_params = {_SITE: start.clone()}
            kernel.setup(0)
            kernel.mass_matrix_adapter.inverse_mass_matrix = {(_SITE,): warm.factor[m]}
            state = kernel.initial_params
            for _ in range(draws):
                for _ in range(int(warm.thin)):
                    state = kernel.sample(state)
                z.append(state[_SITE].detach().clone())
                energy = (
                    kernel._potential_energy_last.detach().double()
                )  # of the state itself: nothing is evaluated again
                phi.append(0.5 * z[-1].double().square().sum() - energy)
    shape = (len(warm.states), draws)
    return Draws(torch.stack(z).unflatten(0, shape), torch.stack(phi).reshape(shape), math.nan, potential.calls)
