"""Closed forms: the exact optimum of linear-quadratic problems and of Gaussian-mixture models."""

from .base import ExactControl, ExactSolution
from .solve import exact_solution

__all__ = ["ExactControl", "ExactSolution", "exact_solution"]
