"""Kernels and memory layers timed side by side: python -m ultramem_megatron.kernels.benchmarks."""
