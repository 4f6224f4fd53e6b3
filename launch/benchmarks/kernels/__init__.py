"""Kernels and memory layers timed side by side: python -m launch.benchmarks.kernels."""
