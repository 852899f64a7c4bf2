"""The statements, in the order of the tutorial; importing this package registers every check."""

from . import chain, continuous, errata, estimators, finite, mixtures, models, paths, sampling, solvers  # noqa: F401
