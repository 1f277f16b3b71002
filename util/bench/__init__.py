"""Benchmarks, for scripts/bench.py alone. Imports everything, the mains too."""
