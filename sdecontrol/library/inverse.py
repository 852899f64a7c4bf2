"""Linear inverse problems with a Gaussian-mixture prior: fine-tuning with everything in closed form.

The setting of Cardoso et al. 2308.07983 and of the particle and guidance samplers that followed it: a diffusion model
whose data are a mixture of 25 Gaussians, observed through a linear map with Gaussian noise. The posterior is again a
mixture.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..problems.problem import ControlProblem
from ..problems.rewards import Quadratic
from ..processes.generative import generative_sde
from ..processes.laws import GaussianMixture
from ..processes.schedules import VP
from ..randomness import published_generator
from ..tensors import check_count

_SIDE = 8.0  # distance between neighbouring means, in each coordinate


class MixtureObservation(NamedTuple):
    """What :func:`mixture_inverse_problem` conditions on, in float64.

    Attributes:
        prior: the law of x: 25 components with unit covariance in d dimensions.
        A: the observed directions, ``(observations, d)``.
        noise: standard deviation of the observation's noise.
        y: the observation, ``(observations,)``.
        x: the state that was observed, ``(d,)``.
    """

    prior: GaussianMixture
    A: Tensor
    noise: float
    y: Tensor
    x: Tensor


def mixture_observation(observations: int, seed: int, dim: int = 8) -> MixtureObservation:
    """The prior and the observation of :func:`mixture_inverse_problem`, same arguments; the global generator is left
    alone."""
    for name, value, least in (("observations", observations, 1), ("seed", seed, 0), ("dim", dim, 2)):
        check_count(name, value, least)
    if dim % 2 or observations > dim:
        raise ValueError(
            "dim must be even (means repeat in pairs of coordinates) and at least the number of observations; got "
            f"dim={dim}, observations={observations}."
        )
    generator = published_generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    grid = torch.arange(-2, 3, dtype=torch.float64)
    means = _SIDE * torch.cartesian_prod(grid, grid).repeat(1, dim // 2)
    prior = GaussianMixture(normal(25) ** 2, means, 1.0)
    left, _, right = torch.linalg.svd(normal(observations, dim), full_matrices=False)
    singular = uniform(observations).sort().values
    A = (left * singular) @ right
    noise = float(uniform() * singular.max())
    x = prior._draw_block(1, generator)[0]
    return MixtureObservation(prior, A, noise, A @ x + noise * normal(observations), x)


def mixture_inverse_problem(observations: int, seed: int, dim: int = 8) -> ControlProblem:
    """Sample from the posterior of x ~ a mixture of 25 Gaussians given ``y = A x + noise``, as the fine-tuning of a
    diffusion model. Version 1.

    Prior: components ``N(mu_ij, I)``, ``mu_ij = (8i, 8j, 8i, 8j, ...)``, i, j in -2..2, weights ``randn^2`` normalised.
    ``A`` is ``observations x dim`` with the singular vectors of a standard normal matrix and sorted singular values
    U(0, 1); the noise's standard deviation is U(0, 1) times the largest of them; x is drawn from the prior. Reference:
    the reversal of ``sc.VP()`` from the prior, with its exact score. Reward ``log p(y | x)`` with its constants, alpha
    = 1: the tilted law is the posterior, log Z is ``log p(y)``, and :func:`exact_solution` knows both, and the value
    and control at all times.

    Args:
        observations: dy >= 1, at most dim; the published ones are 1, 2 and 4.
        seed: of everything random in the definition (weights, A, noise, x, y), drawn in float64 from a generator of its
            own. No two seeds have the same prior.
        dim: even; the published ones are 8 and 80.

    Returns:
        :class:`ControlProblem` in torch's default dtype.

    Raises:
        ValueError: bad arguments.
    """
    prior, A, noise, y, _ = mixture_observation(observations, seed, dim)
    dtype = torch.get_default_dtype()
    model = GaussianMixture(prior.weights.to(dtype), prior.means.to(dtype), 1.0)
    precision = 1 / noise**2
    constant = -0.5 * precision * float(y @ y) - observations * (math.log(noise) + 0.5 * math.log(2 * math.pi))
    reward = Quadratic(G=(precision * A.mT @ A).to(dtype), g=(precision * A.mT @ y).to(dtype), c=constant)
    return ControlProblem(generative_sde(model, schedule=VP()), reward=reward, alpha=1.0)
