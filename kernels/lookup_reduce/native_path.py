"""Lookup-reduce through native.cpp: forward by tokens, backward by rows.

N table rows, V value dim, T tokens, P picks per token, C cores, E groups.
"""

import torch
from torch import Tensor

from ultramem_megatron.kernels.lookup_reduce import torch_path
from ultramem_megatron.kernels.native.library import call_native, native_library
from ultramem_megatron.kernels.quantized import QuantizedRows, format_of

_KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def serves(table: Tensor) -> bool:
    """Whether there are native kernels for a table of this dtype on this machine."""
    return table.dtype in _KINDS and native_library() is not None


def pool(table: Tensor, rows: Tensor, groups: Tensor, scores: Tensor, num_groups: int) -> Tensor:
    """Same contract as `lookup_reduce_reference`, without a graph.

    Raises IndexError for rows or groups that are not there, which C++ would read or write all the
    same: a damaged checkpoint's shuffle can name them.
    """
    check_indices(rows, len(table), "table row")
    check_indices(groups, num_groups, "group")
    tokens, picks, cores = scores.shape
    out = table.new_empty(tokens, num_groups, table.shape[1])
    sizes = (tokens, picks, cores, num_groups, table.shape[1])
    call_for_dtype("lookup_pool", table, rows, groups, scores.float(), out, *sizes)
    return out


def pool_quantized(
    table: QuantizedRows,
    rows: Tensor,
    groups: Tensor,
    scores: Tensor,
    num_groups: int,
    dtype: torch.dtype,
) -> Tensor:
    """As `quantized.lookup_quantized`, of a table on the CPU; dtype: float32 or bfloat16."""
    codes, scales = (part.contiguous() for part in table)
    check_indices(rows, len(codes), "table row")
    check_indices(groups, num_groups, "group")
    tokens, picks, cores = scores.shape
    width, blocks = codes.shape[1], scales.shape[1]
    out = torch.empty(tokens, num_groups, width, dtype=dtype)
    picked = (rows.contiguous(), groups.contiguous(), scores.float().contiguous())
    sizes = (tokens, picks, cores, num_groups, width, blocks)
    name = f"lookup_coded_{format_of(codes)}_to_{_KINDS[dtype]}"
    call_native(name, codes, scales, *picked, out, *sizes)
    return out


def backward(
    grad: Tensor,
    table: Tensor,
    rows: Tensor,
    groups: Tensor,
    scores: Tensor,
    target: Tensor | None,
    with_scores: bool,
) -> Tensor | None:
    """As `torch_path.backward`; a `target` that `takes` does not know takes that road.

    Raises IndexError as `pool` does: lookup-dot begins here.
    """
    check_indices(rows, len(table), "table row")
    check_indices(groups, grad.shape[1], "group")
    native_target = target if target is not None and takes(target, table.dtype) else None
    dots = scores.new_empty(scores.shape, dtype=torch.float32) if with_scores else None
    tensors = (table, rows, groups, scores.float(), native_target, dots)
    sizes = (*scores.shape, grad.shape[1], grad.shape[2])
    added_to = torch.float32 if native_target is None else native_target.dtype
    name = f"lookup_backward_{_KINDS[table.dtype]}_to"
    call_for_dtype(name, grad.to(table.dtype), *tensors, *sizes, dtype=added_to)
    if target is not None and native_target is None:
        torch_path.backward(grad, table, rows, groups, scores, target, with_scores=False)
    return None if dots is None else dots.to(scores.dtype)


def check_indices(indices: Tensor, size: int, what: str) -> None:
    """Raise IndexError for an index outside 0..size-1."""
    if indices.numel() == 0:
        return
    for index in map(int, indices.aminmax()):
        if not 0 <= index < size:
            raise IndexError(f"{what} {index} of {size}")


def clear(target: Tensor, rows: Tensor) -> None:
    """Set `rows`, int64 and of any shape, of a contiguous target to zero."""
    row_bytes = target.shape[1] * target.element_size()
    call_native("lookup_clear", target, rows.contiguous(), rows.numel(), row_bytes)


def takes(target: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether C++ can add to it, from a table of `dtype`."""
    return target.dtype in (torch.float32, dtype) and target.is_contiguous()


def call_for_dtype(
    name: str, *arguments: Tensor | int | None, dtype: torch.dtype | None = None
) -> None:
    """`name` for a dtype, by default that of the first argument."""
    first = arguments[0]
    assert isinstance(first, Tensor)
    tensors = (a for a in arguments if isinstance(a, Tensor))
    assert all(a.is_floating_point() or a.dtype == torch.int64 for a in tensors), "int64 indices"
    kept = [a.contiguous() if isinstance(a, Tensor) else a for a in arguments]
    call_native(f"{name}_{_KINDS[dtype or first.dtype]}", *kept)
