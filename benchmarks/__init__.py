"""Benchmarks, run from the repository: ``python -m benchmarks control --problem NAME``."""
