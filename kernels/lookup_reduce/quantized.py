"""Lookup-reduce of a table in 8 bits, which is only read.

N table rows, V value dim, T tokens, P picks per token, C cores, E groups.
"""

import torch
from torch import Tensor

from ultramem_megatron.kernels.dispatch import implementation
from ultramem_megatron.kernels.lookup_reduce import native_path
from ultramem_megatron.kernels.lookup_reduce.autograd import lookup_reduce
from ultramem_megatron.kernels.quantized import QuantizedRows


def lookup_quantized(
    table: QuantizedRows,
    rows: Tensor,
    groups: Tensor,
    scores: Tensor,
    num_groups: int,
    dtype: torch.dtype,
) -> Tensor:
    """`lookup_reduce` (T, E, V) in `dtype` of the values that codes and scales stand for.

    Without a graph. Triton's and C++'s kernels decode in registers, Triton's also of tables in
    pinned host memory; elsewhere the rows that are read are decoded first, each once.
    """
    chosen = implementation(scores.device)
    if chosen == "native" and dtype in (torch.float32, torch.bfloat16):
        return native_path.pool_quantized(table, rows, groups, scores, num_groups, dtype)
    if chosen == "triton":
        from ultramem_megatron.kernels.lookup_reduce import triton_forward  # needs Triton installed

        return triton_forward.pool_quantized(table, rows, groups, scores, num_groups, dtype)
    distinct, places = rows.unique(return_inverse=True)
    decoded = table.at(distinct.to(table.codes.device)).to(scores.device, dtype)
    return lookup_reduce(decoded, places, groups, scores, num_groups)
