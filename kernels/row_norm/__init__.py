"""Norms of rows with a gain: layer norm and RMS norm, and keys normed for their products."""

from ultramem_megatron.kernels.row_norm.choice import normed_keys, row_norm
from ultramem_megatron.kernels.row_norm.reference import normed_keys_reference, row_norm_reference

__all__ = ["normed_keys", "normed_keys_reference", "row_norm", "row_norm_reference"]
