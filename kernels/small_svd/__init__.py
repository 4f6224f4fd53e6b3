"""Singular values and vectors of a few matrices of a few rows, without a wait for the host."""

from ultramem_megatron.kernels.small_svd.choice import singular_values, small_svd

__all__ = ["singular_values", "small_svd"]
