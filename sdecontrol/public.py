"""The public face: every name of ``sdecontrol``, from the room that makes it.

``sdecontrol/__init__.py`` imports this file at the first use of a name. The rooms are imported with it, so that every
method, control and solution that a file may name has then registered itself.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from .chains.diffusion import diffusion_chain
from .chains.masked import masked_diffusion
from .chains.noise_driven import discrete_dynamics
from .comparison.auto import Auto
from .comparison.compare import compare
from .comparison.design import design
from .comparison.receding_horizon import RecedingHorizon
from .comparison.recommend import recommend
from .controls.base import Control
from .errors import (
    BadFileError,
    ImproperTarget,
    NoExactSolution,
    NoLikelihood,
    NonFiniteError,
    NotDifferentiable,
    RewardError,
)
from .evaluation.certificates import certify
from .evaluation.metrics import control_error
from .exact import exact_solution
from .methods import (
    HMC,
    MALA,
    NUTS,
    SMC,
    SOCM,
    AdaptiveImportance,
    AdjointMatching,
    BestOfN,
    BridgeMatching,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    CrossEntropy,
    LogVariance,
    Method,
    ParticleMatching,
    PathConsistency,
    PathIntegralGuidance,
    Reinforce,
    RewardBackprop,
    RewardWeightedMLE,
    SoftPPO,
    TemperedSMC,
    ValueGuidance,
)
from .models.diffusers import from_diffusers
from .models.lora import LoRA
from .models.pyro import from_pyro
from .problems.black_box import BlackBox
from .problems.f_divergence import FDivergence
from .problems.gibbs import gibbs_problem
from .problems.problem import ControlProblem
from .problems.prompts import Prompts
from .problems.rewards import Linear, LogProb, OneHot, Quadratic, QuadraticCost, WeightedRewards
from .problems.sampling import log_likelihood
from .problems.simulate import simulate
from .processes.generative import generative_sde
from .processes.jump import JumpProcess
from .processes.laws import Dirac, Gaussian, GaussianMixture
from .processes.linear import BrownianMotion, LinearSDE, OrnsteinUhlenbeck
from .processes.manifolds import ManifoldSDE, Sphere, Torus
from .processes.region import Region
from .processes.schedules import VE, VP, CosineVP, FlowMatching
from .processes.sde import SDE
from .processes.semilinear import SemilinearSDE
from .training.distill import distill
from .training.fit_bridge import fit_bridge
from .training.fit_masked import fit_masked_diffusion
from .training.fit_reward import fit_reward
from .training.fit_score import fit_score
from .training.solve import load, solve

if TYPE_CHECKING:
    from . import library, metrics

__all__ = [
    "HMC",
    "MALA",
    "NUTS",
    "SDE",
    "SMC",
    "SOCM",
    "VE",
    "VP",
    "AdaptiveImportance",
    "AdjointMatching",
    "Auto",
    "BadFileError",
    "BestOfN",
    "BlackBox",
    "BridgeMatching",
    "BrownianMotion",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "Control",
    "ControlProblem",
    "CosineVP",
    "CrossEntropy",
    "Dirac",
    "FDivergence",
    "FlowMatching",
    "Gaussian",
    "GaussianMixture",
    "ImproperTarget",
    "JumpProcess",
    "Linear",
    "LinearSDE",
    "LoRA",
    "LogProb",
    "LogVariance",
    "ManifoldSDE",
    "Method",
    "NoExactSolution",
    "NoLikelihood",
    "NonFiniteError",
    "NotDifferentiable",
    "OneHot",
    "OrnsteinUhlenbeck",
    "ParticleMatching",
    "PathConsistency",
    "PathIntegralGuidance",
    "Prompts",
    "Quadratic",
    "QuadraticCost",
    "RecedingHorizon",
    "Region",
    "Reinforce",
    "RewardBackprop",
    "RewardError",
    "RewardWeightedMLE",
    "SemilinearSDE",
    "SoftPPO",
    "Sphere",
    "TemperedSMC",
    "Torus",
    "ValueGuidance",
    "WeightedRewards",
    "certify",
    "compare",
    "control_error",
    "design",
    "diffusion_chain",
    "discrete_dynamics",
    "distill",
    "exact_solution",
    "fit_bridge",
    "fit_masked_diffusion",
    "fit_reward",
    "fit_score",
    "from_diffusers",
    "from_pyro",
    "generative_sde",
    "gibbs_problem",
    "library",
    "load",
    "log_likelihood",
    "masked_diffusion",
    "metrics",
    "recommend",
    "simulate",
    "solve",
]

_LATER = ("library", "metrics")  # modules that are imported when they are used

#: names that were flat in 0.1.0 -> the module that has them now
_MOVED = {
    "Advice": "sdecontrol.comparison.recommend",
    "Callback": "sdecontrol.training.callbacks",
    "Certificate": "sdecontrol.evaluation.certificates",
    "Comparison": "sdecontrol.comparison.compare",
    "Estimate": "sdecontrol.evaluation.estimates",
    "Evaluation": "sdecontrol.evaluation.evaluate",
    "GibbsProblem": "sdecontrol.problems.gibbs",
    "Paths": "sdecontrol.paths.paths",
    "ReferenceSamples": "sdecontrol.library",
    "Solution": "sdecontrol.evaluation.solution",
    "SolvedPaths": "sdecontrol.paths.solvers",
    "energy_wasserstein": "sdecontrol.metrics",
    "log_weights": "sdecontrol.evaluation.evaluate",
    "mixture_inverse_problem": "sdecontrol.library",
    "mmd": "sdecontrol.metrics",
    "mode_coverage": "sdecontrol.metrics",
    "named_problem": "sdecontrol.library",
    "named_target": "sdecontrol.library",
    "problem_names": "sdecontrol.library",
    "reference_samples": "sdecontrol.library",
    "sinkhorn": "sdecontrol.metrics",
    "sliced_wasserstein": "sdecontrol.metrics",
    "target_card": "sdecontrol.library",
    "target_names": "sdecontrol.library",
    "wasserstein": "sdecontrol.metrics",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return importlib.import_module(f".{name}", __package__)
    if name in _MOVED:
        place = _MOVED[name]
        warnings.warn(f"sdecontrol.{name} has moved: use {place}.{name}.", DeprecationWarning, stacklevel=3)
        return getattr(importlib.import_module(place), name)
    raise AttributeError(f"module {__package__!r} has no attribute {name!r}")
