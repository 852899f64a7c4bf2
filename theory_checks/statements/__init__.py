"""The statements, in the order of the tutorial; importing this package registers every check."""

from . import (  # noqa: F401
    chain,
    continuous,
    errata,
    estimators,
    evaluation,
    finite,
    gradients,
    grids,
    guidance,
    kernels,
    mixtures,
    models,
    particles,
    paths,
    sampling,
    solvers,
    stopping,
)
