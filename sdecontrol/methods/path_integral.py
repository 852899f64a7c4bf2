"""``PathIntegralGuidance``: the control as an average over simulated paths, with nothing trained (tutorial [32])."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..controls.given import given_control
from ..controls.path_integral import PathIntegralControl
from ..randomness import Place, derive_seed
from ..tensors import check_count
from .base import ControlState, Method, Run, register


@register
@dataclass(frozen=True)
class PathIntegralGuidance(Method):
    """At every step and state, ``c_k(x) = E[exp(R/alpha) xi_k | x_k = x] / E[exp(R/alpha) | x_k = x]`` over simulated
    paths.

    Tutorial [32], with the constants of docs/mathematics.md; Kappen 2005, Zhang et al. 2014 for the importance-sampled
    form. No gradient of the reward, nothing trained: the work is done at sampling time, ``num_paths`` paths to the end
    per step and sample, so ``K^2 num_paths / 2`` steps for a sample. In the limit of many paths it is the mean shift of
    the chain's soft-optimal kernel; see :class:`PathIntegralControl` for its errors. ``solution.control.ess`` has the
    effective fraction of the paths at every step of the last use; a low one warns.

    Of tokens it is their kernel, ``E[w 1{x_{k+1} = y}]/E[w]`` position by position (of masked ones
    ``E[w 1{x_K = y}]/E[w]``, since a token stays), and the reference's counts as one path more.

    Args:
        num_paths: n of every average. The KL to the optimum that they cost is about ``K d / (2 n ess)``.
        proposal: simulate the paths with this control (or solution) and weigh them by ``dQ0/dP^v``; None: the
            reference.
        antithetic: paths in pairs of opposite noise: n even.
        control_variate: subtract ``E xi = 0`` as estimated from the same paths: without it the average has the noise of
            plain ``xi`` even where all weights are equal.
    """

    num_paths: int = 256
    proposal: Any = None
    antithetic: bool = False
    control_variate: bool = True

    of_noise: ClassVar[bool] = True
    tokens: ClassVar[bool] = True
    default_iterations: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_count("num_paths", self.num_paths, 2, why="one path has no average")
        if self.antithetic and self.num_paths % 2:
            raise ValueError(f"num_paths must be even for antithetic pairs, got {self.num_paths}.")

    def setup(self, run: Run) -> nn.Module:
        return ControlState(
            PathIntegralControl(
                run.problem,
                run.chain,
                given_control(run.problem, self.proposal),
                num_paths=self.num_paths,
                antithetic=self.antithetic,
                control_variate=self.control_variate,
                seed=derive_seed(run.seed, Place.PATH_INTEGRAL_CONTROL),
            )
        )
