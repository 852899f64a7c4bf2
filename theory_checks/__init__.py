"""The theory of the tutorial, checked numerically, with the power to fail.

``python -m theory_checks`` (also ``sdecontrol verify``) runs the suite; :func:`verify` checks a solution of your own::

    report = theory_checks.verify(problem, solution)
    print(report)
    assert report.passed

Every check is a short function in ``theory_checks.statements`` whose docstring is the statement. It tests the library
through its public interface against independent formulas (dense Gaussian laws, quadrature), and is run again on broken
variants, on which it must fail.
"""

from .registry import Check, Measurement, Setting, all_checks, check, select
from .runner import Outcome, run, run_check
from .user import Finding, Verification, verify

__all__ = [
    "Check",
    "Finding",
    "Measurement",
    "Outcome",
    "Setting",
    "Verification",
    "all_checks",
    "check",
    "run",
    "run_check",
    "select",
    "verify",
]
