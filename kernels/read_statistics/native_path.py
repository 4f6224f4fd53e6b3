"""Statistics through native.cpp, in one call. Letters as in reference.py."""

import torch
from torch import Tensor

from ultramem_megatron.kernels.native.library import call_native, native_library
from ultramem_megatron.kernels.read_statistics.reference import COMPARED, Counting

_KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def serves(query: Tensor, scores: Tensor, output: Tensor) -> bool:
    """Whether there are native kernels for these dtypes on this machine."""
    alike = query.dtype == output.dtype and output.dtype in _KINDS
    return alike and scores.dtype == torch.float32 and native_library() is not None


@torch.no_grad()
def add(
    sums: Tensor,
    hits: Tensor,
    counting: Counting,
    addresses: Tensor,
    query: Tensor,
    scores: Tensor,
    output: Tensor,
    topk: int,
) -> None:
    """Same contract as `add_statistics_reference`, for what `serves`."""
    tokens, queries, sides, width = query.shape
    tensors = (output, query, scores, addresses)
    kept = [tensor.contiguous() for tensor in tensors]  # alive until they are read
    sizes = (output.numel(), tokens, max(1, tokens // COMPARED), queries * sides, width)
    picked = (*scores.shape[1:], topk)
    call_native(
        f"read_statistics_{_KINDS[output.dtype]}", *kept, sums, hits, *sizes, *picked, *counting
    )
