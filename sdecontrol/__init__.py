"""sdecontrol: continuous-time stochastic control in PyTorch.

Fine-tuning a diffusion model, driving a stochastic system and sampling an unnormalised density are one problem,
``min_u KL(P^u || Q_fine)``: state it as a :class:`ControlProblem`, then :func:`solve` it.
"""

from .chains.noise_driven import discrete_dynamics
from .chains.pretrained import diffusion_chain
from .comparison.auto import Auto
from .comparison.compare import Comparison, compare
from .comparison.recommend import Advice, recommend
from .controls.base import Control
from .errors import BadFileError, ImproperTarget, NoExactSolution, NoLikelihood, NonFiniteError, NotDifferentiable
from .evaluation.certificates import Certificate, certify
from .evaluation.estimates import Estimate
from .evaluation.evaluate import Evaluation, log_weights
from .evaluation.metrics import (
    control_error,
    energy_wasserstein,
    mmd,
    mode_coverage,
    sinkhorn,
    sliced_wasserstein,
    wasserstein,
)
from .evaluation.solution import Solution
from .exact import exact_solution
from .library.inverse import mixture_inverse_problem
from .library.problems import named_problem, problem_names
from .library.reference_samples import ReferenceSamples, reference_samples
from .library.targets import named_target, target_card, target_names
from .methods import (
    HMC,
    MALA,
    NUTS,
    SMC,
    SOCM,
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
from .paths.paths import Paths
from .paths.solvers import SolvedPaths
from .problems.f_divergence import FDivergence
from .problems.gibbs import GibbsProblem, gibbs_problem
from .problems.problem import ControlProblem
from .problems.rewards import Linear, LogProb, Quadratic, QuadraticCost
from .problems.sampling import log_likelihood
from .problems.simulate import simulate
from .processes.generative import generative_sde
from .processes.laws import Dirac, Gaussian, GaussianMixture
from .processes.linear import BrownianMotion, LinearSDE, OrnsteinUhlenbeck
from .processes.schedules import VE, VP, CosineVP, FlowMatching
from .processes.sde import SDE
from .processes.semilinear import SemilinearSDE
from .training.callbacks import Callback
from .training.fit_bridge import fit_bridge
from .training.fit_score import fit_score
from .training.solve import load, solve

__version__ = "0.1.0"

__all__ = [
    "HMC",
    "MALA",
    "NUTS",
    "SDE",
    "SMC",
    "SOCM",
    "VE",
    "VP",
    "AdjointMatching",
    "Advice",
    "Auto",
    "BadFileError",
    "BestOfN",
    "BridgeMatching",
    "BrownianMotion",
    "Callback",
    "Certificate",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "Comparison",
    "Control",
    "ControlProblem",
    "CosineVP",
    "CrossEntropy",
    "Dirac",
    "Estimate",
    "Evaluation",
    "FDivergence",
    "FlowMatching",
    "Gaussian",
    "GaussianMixture",
    "GibbsProblem",
    "ImproperTarget",
    "Linear",
    "LinearSDE",
    "LogProb",
    "LogVariance",
    "Method",
    "NoExactSolution",
    "NoLikelihood",
    "NonFiniteError",
    "NotDifferentiable",
    "OrnsteinUhlenbeck",
    "ParticleMatching",
    "PathConsistency",
    "PathIntegralGuidance",
    "Paths",
    "Quadratic",
    "QuadraticCost",
    "ReferenceSamples",
    "Reinforce",
    "RewardBackprop",
    "RewardWeightedMLE",
    "SemilinearSDE",
    "SoftPPO",
    "Solution",
    "SolvedPaths",
    "TemperedSMC",
    "ValueGuidance",
    "certify",
    "compare",
    "control_error",
    "diffusion_chain",
    "discrete_dynamics",
    "energy_wasserstein",
    "exact_solution",
    "fit_bridge",
    "fit_score",
    "generative_sde",
    "gibbs_problem",
    "load",
    "log_likelihood",
    "log_weights",
    "mixture_inverse_problem",
    "mmd",
    "mode_coverage",
    "named_problem",
    "named_target",
    "problem_names",
    "recommend",
    "reference_samples",
    "simulate",
    "sinkhorn",
    "sliced_wasserstein",
    "solve",
    "target_card",
    "target_names",
    "wasserstein",
]
