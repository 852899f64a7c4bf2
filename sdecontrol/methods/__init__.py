"""One file per algorithm: where its paths come from, and its loss."""

from .base import Method, find_method, method_names
from .reward_backprop import RewardBackprop

__all__ = ["Method", "RewardBackprop", "find_method", "method_names"]
