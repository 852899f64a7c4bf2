"""One file per algorithm: where its paths come from, and its loss."""

from .adaptive_importance import AdaptiveImportance
from .adjoint_matching import AdjointMatching
from .base import Method, find_method, method_names
from .best_of_n import BestOfN
from .bridge_matching import BridgeMatching
from .classifier_free_guidance import ClassifierFreeGuidance
from .classifier_guidance import ClassifierGuidance
from .cross_entropy import CrossEntropy
from .log_variance import LogVariance
from .mcmc import HMC, MALA, NUTS
from .particle_matching import ParticleMatching
from .path_consistency import PathConsistency
from .path_integral import PathIntegralGuidance
from .reinforce import Reinforce
from .reward_backprop import RewardBackprop
from .reward_weighted_mle import RewardWeightedMLE
from .smc import SMC
from .socm import SOCM
from .soft_ppo import SoftPPO
from .tempered_smc import TemperedSMC
from .value_guidance import ValueGuidance

__all__ = [
    "HMC",
    "MALA",
    "NUTS",
    "SMC",
    "SOCM",
    "AdaptiveImportance",
    "AdjointMatching",
    "BestOfN",
    "BridgeMatching",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "CrossEntropy",
    "LogVariance",
    "Method",
    "ParticleMatching",
    "PathConsistency",
    "PathIntegralGuidance",
    "Reinforce",
    "RewardBackprop",
    "RewardWeightedMLE",
    "SoftPPO",
    "TemperedSMC",
    "ValueGuidance",
    "find_method",
    "method_names",
]
