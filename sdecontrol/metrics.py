"""``sc.metrics``: distances between sets of samples, coverage of modes, the error of a control.

They are written in ``evaluation/metrics.py``, ``sequence_metrics.py`` and ``symmetric_metrics.py``; the file here is
the name by which users know them.
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
from .evaluation.sequence_metrics import edit_diversity, kmer_correlation, kmer_distance, kmer_spectrum, total_variation
from .evaluation.symmetric_metrics import symmetric_distances, symmetric_wasserstein

__all__ = [
    "ControlError",
    "ModeCoverage",
    "control_error",
    "edit_diversity",
    "energy_wasserstein",
    "kmer_correlation",
    "kmer_distance",
    "kmer_spectrum",
    "mmd",
    "mode_coverage",
    "sinkhorn",
    "sliced_wasserstein",
    "symmetric_distances",
    "symmetric_wasserstein",
    "total_variation",
    "wasserstein",
]
