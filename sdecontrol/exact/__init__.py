"""Exact optima: linear-quadratic problems and Gaussian-mixture models in closed form, low-dimensional blocks on
grids."""

from .base import ExactControl, ExactSolution
from .solve import exact_solution

__all__ = ["ExactControl", "ExactSolution", "exact_solution"]
