"""Which norm runs; see dispatch.py."""

import torch
from torch import Tensor

from ultramem_megatron.kernels.dispatch import implementation
from ultramem_megatron.kernels.row_norm.reference import normed_keys_reference, row_norm_reference

WIDEST = 8192
"""Of what the Triton kernels hold of a row."""


def row_norm(x: Tensor, gain: Tensor, eps: float, centred: bool) -> Tensor:
    """Same contract as `row_norm_reference`."""
    if not _fused(x, gain):
        return row_norm_reference(x, gain, eps, centred)
    from ultramem_megatron.kernels.row_norm.fused import norm_rows  # needs Triton

    return norm_rows(x, gain, eps, centred)


def normed_keys(keys: Tensor, gain: Tensor, eps: float, centred: bool, queries: int) -> Tensor:
    """Same contract as `normed_keys_reference`; on GPUs norm and layout are one kernel."""
    if not _fused(keys, gain):
        return normed_keys_reference(keys, gain, eps, centred, queries)
    from ultramem_megatron.kernels.row_norm.fused import norm_keys

    return norm_keys(keys, gain, eps, centred, queries)


def _fused(x: Tensor, gain: Tensor) -> bool:
    narrow = x.dtype != torch.float64 and len(gain) <= WIDEST
    return implementation(x.device) == "triton" and narrow
