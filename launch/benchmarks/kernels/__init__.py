"""Kernels and memory layers timed side by side: ultramem bench kernels."""
