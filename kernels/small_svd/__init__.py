"""Singular values of a few matrices of a few rows, without a wait for the host."""

from ultramem_megatron.kernels.small_svd.choice import decomposes, singular_values

__all__ = ["decomposes", "singular_values"]
