"""The lookup behind pre-values in tables of 8 bits, only read. Letters as in reference.py."""

import torch
from torch import Tensor

from ultramem_megatron.kernels.dispatch import implementation
from ultramem_megatron.kernels.lookup_prevalued.activations import IN_KERNELS
from ultramem_megatron.kernels.lookup_prevalued.autograd import lookup_prevalued
from ultramem_megatron.kernels.lookup_prevalued.contract import Picks
from ultramem_megatron.kernels.precision import at_least_float32
from ultramem_megatron.kernels.quantized import QuantizedRows


def lookup_prevalued_quantized(
    table: QuantizedRows,
    pre_table: QuantizedRows,
    rows: Tensor,
    groups: Tensor,
    scores: Tensor,
    x: Tensor,
    num_groups: int,
    act: str,
    dtype: torch.dtype,
) -> Tensor:
    """`lookup_prevalued` (T, E, V) in `dtype` of the values that codes and scales stand for.

    Both tables in one format. Without a graph, and with tables where `lookup_quantized` takes them
    from, but for an activation that is not IN_KERNELS.
    """
    if implementation(scores.device) == "triton" and act in IN_KERNELS:
        from ultramem_megatron.kernels.lookup_prevalued import triton_path  # needs Triton installed

        codes = (t.codes.view(torch.int8) for t in (table, pre_table))
        picked = Picks(*codes, rows, groups, at_least_float32(scores), x.to(dtype))
        out = scores.new_empty(len(rows), num_groups, table.codes.shape[1], dtype=dtype)
        return triton_path.forward_quantized((table, pre_table), picked, out, act)
    distinct, places = rows.unique(return_inverse=True)
    here = distinct.to(table.codes.device)
    values, before = (t.at(here).to(scores.device, dtype) for t in (table, pre_table))
    return lookup_prevalued(values, before, places, groups, scores, x, num_groups, act)
