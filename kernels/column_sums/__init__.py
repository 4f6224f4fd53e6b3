"""Sums of the columns of what the programs of a kernel have left, in a fixed order."""

from ultramem_megatron.kernels.column_sums.triton_kernel import column_sums

__all__ = ["column_sums"]
