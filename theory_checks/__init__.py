"""The theory of the tutorial, checked numerically, with the power to fail: ``python -m theory_checks``."""
