"""``sc.metrics``: distances between sets of samples, coverage of modes, the error of a control.

They are written in ``evaluation/metrics.py``; the file here is the name by which users know them.
"""

from .evaluation.metrics import (
    ControlError,
    ModeCoverage,
    control_error,
    energy_wasserstein,
    mmd,
    mode_coverage,
    sinkhorn,
    sliced_wasserstein,
    wasserstein,
)

__all__ = [
    "ControlError",
    "ModeCoverage",
    "control_error",
    "energy_wasserstein",
    "mmd",
    "mode_coverage",
    "sinkhorn",
    "sliced_wasserstein",
    "wasserstein",
]
