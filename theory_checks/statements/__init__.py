"""The statements, in the order of the tutorial; importing this package registers every check."""

from . import (  # noqa: F401
    answers,
    chain,
    continuous,
    doors,
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
    schemes,
    solvers,
    stopping,
)
