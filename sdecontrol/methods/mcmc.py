"""``MALA``, ``HMC``, ``NUTS``: parallel Markov chains on the density of a Gibbs problem. Nothing is learned but their
kernels."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..controls.base import Control
from ..controls.given import given_control
from ..errors import NotDifferentiable
from ..evaluation.chain_solution import ChainSettings, ChainSolution, chain_target
from ..particles.nuts import import_nuts
from ..problems.problem import ControlProblem
from ..tensors import check_count, check_positive
from .base import ControlState, Method, Run, gradient_free, register


@dataclass(frozen=True)
class _Chains(Method):
    """What the three have in common. Fields of the subclasses are those of :class:`ChainSettings`."""

    num_chains: int = 256
    warm_up: int = 500
    thin: int | None = None
    width: float = 2.0

    default_iterations: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_count("num_chains", self.num_chains, 2)
        check_count("warm_up", self.warm_up, 20)
        check_positive("width", self.width)
        check_count("thin", self.thin, 1, optional=True)

    @property
    def settings(self) -> ChainSettings:
        return ChainSettings(self.name, **{**vars(self), "width": float(self.width)})

    def check(self, problem: ControlProblem) -> None:
        if problem.density is None:
            raise ValueError(
                f"{self.name} runs chains on a density, which only a gibbs_problem has; sc.TemperedSMC() moves the "
                "noises of any problem's paths."
            )
        if problem.condition is not None:
            raise ValueError("condition: chains need one target; make a problem with the condition fixed.")
        if not problem.has_gradient:
            raise NotDifferentiable(
                f"{self.name} moves by the gradient of the log density, and this one has none. Use a method that needs "
                f"none ({', '.join(gradient_free(problem))}), or sc.TemperedSMC(), which then moves by preconditioned "
                "Crank-Nicolson steps. Or give score=, or write the density in torch operations."
            )

    def setup(self, run: Run) -> nn.Module:
        chain_target(run.problem, self.settings)
        return ControlState(given_control(run.problem, None))

    def make_solution(self, problem: ControlProblem, control: Control, **facts: Any) -> ChainSolution:
        return ChainSolution(problem, control, chains=self.settings, **facts)


@register
@dataclass(frozen=True)
class MALA(_Chains):
    """The Metropolis-adjusted Langevin algorithm (Roberts & Tweedie 1996), many chains at once
    (``particles/markov.py``).

    Chains start over-dispersed. A warm-up adapts step size and a Gaussian preconditioner to all of them together, and
    freezes both. ``solution.diagnostics()`` says whether they agree, ``solution.evaluate()`` has log Z by bridge
    sampling.

    Args:
        num_chains: at once.
        warm_up: moves of each before the kernel is frozen.
        thin: moves between two draws; None: by the autocorrelation at the end of the warm-up, 16 at most.
        width: of the Gaussian that chains start from, in units of the reference's end.

    Raises:
        ValueError: no Gibbs problem, or one with conditions. NotDifferentiable: no gradient. NonFiniteError: a log
            density that is nan, +inf, or -inf at all starts.
    """


@register
@dataclass(frozen=True)
class HMC(_Chains):
    """Hamiltonian Monte Carlo (Neal 1206.1901), as :class:`MALA` with several leapfrog steps a move.

    Args:
        leapfrog_steps: of a move; None: as many as turn its trajectory far enough, 16 at most.
    """

    leapfrog_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("leapfrog_steps", self.leapfrog_steps, 1, optional=True)


@register
@dataclass(frozen=True)
class NUTS(_Chains):
    """The no-U-turn sampler (Hoffman & Gelman 1111.4246) of pyro-ppl, which ``pip install 'sdecontrol[mcmc]'`` brings;
    else as :class:`MALA`.

    One chain after another, state by state: for few draws of high quality, and as a yardstick.

    Args:
        num_chains, warm_up: each chain adapts its own step size and mass matrix.
        max_tree_depth: a move has at most 2 to this power leapfrog steps.

    Raises:
        ModuleNotFoundError: pyro-ppl is missing; besides those of :class:`MALA`.
    """

    num_chains: int = 4
    warm_up: int = 300
    max_tree_depth: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("max_tree_depth", self.max_tree_depth, 1)

    def check(self, problem: ControlProblem) -> None:
        super().check(problem)
        import_nuts()
