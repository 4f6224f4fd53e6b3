"""Stand-ins for what cannot run without data: results of the right shapes, keeping what is kept.

T tokens, H heads, S sides, R ranks, m top-m, P picks, C cores, E groups, V value dim.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from ultramem_megatron.communication.pausing import Steps
from ultramem_megatron.kernels.precision import at_least_float32
from ultramem_megatron.memory.tables.number_wise import NumberWiseReader
from ultramem_megatron.memory.tables.replicated import ReplicatedReader


@contextmanager
def shapes_only(chunks: list[Any]) -> Iterator[list[int]]:
    """Within it, the model chunks run on the meta device, forward and backward.

    Yields a list to which every attention's forward pass adds the bytes of its keys and values.

    Attention keeps queries, keys, values and output, as a flash attention does, not the scores.
    """
    attended: list[int] = []
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, DotProductAttention):
                module.forward = attention_of_shapes(attended)
            elif isinstance(getattr(module, "_reader", None), NumberWiseReader):
                module._reader = _RowsAtHome(module.layout.num_values, module._reader.num_groups)
        rotary = getattr(chunk, "rotary_pos_emb", None)
        if rotary is not None:
            rotary.inv_freq = rotary.inv_freq.to("meta")
    with ExitStack() as stack:
        for name, stand_in in _KERNELS.items():
            stack.enter_context(mock.patch(f"ultramem_megatron.{name}", stand_in))
        yield attended


class _Kept(torch.autograd.Function):
    """An empty result; keeps the tensors for the backward, and the result where asked to."""

    @staticmethod
    def forward(ctx: Any, shape: Any, dtype: Any, keeps_result: bool, *tensors: Tensor) -> Tensor:
        """The first tensor's device."""
        result = tensors[0].new_empty(shape, dtype=dtype)
        ctx.save_for_backward(*tensors, *([result] if keeps_result else []))
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Gradients of the right shapes."""
        needed = ctx.needs_input_grad[3:]
        kept = ctx.saved_tensors[: len(needed)]
        return (
            None,
            None,
            None,
            *(
                torch.empty_like(tensor) if needs else None
                for tensor, needs in zip(kept, needed, strict=True)
            ),
        )


def attention_of_shapes(attended: list[int]) -> Callable[..., Any]:
    """A forward of DotProductAttention; adds the bytes of its keys and values to the list."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Any:
        """(sequence, batch, heads, width) to (sequence, batch, heads * width)."""
        attended.append(k.nbytes + v.nbytes)
        return _Kept.apply((*q.shape[:2], q.shape[2] * v.shape[3]), q.dtype, True, q, k, v)

    return attention


def _lookup_reduce(
    table: Tensor, rows: Tensor, groups: Tensor, scores: Tensor, num_groups: int
) -> Any:
    """(T, E, V)."""
    shape = (len(rows), num_groups, table.shape[1])
    return _Kept.apply(shape, table.dtype, False, table, rows, groups, scores)


def _side_topk(query: Tensor, keys: Tensor, directions: Tensor, topk: int) -> tuple[Tensor, Any]:
    """Indices (T, H, S, m) and scores (T, H, S, R, m)."""
    indices = query.new_empty((*query.shape[:3], topk), dtype=torch.int64)
    dtype = at_least_float32(query).dtype
    return indices, _Kept.apply((*query.shape[:4], topk), dtype, False, query, keys, indices)


def _largest(values: Tensor, topk: int) -> Tensor:
    """Indices (..., m)."""
    return values.new_empty((*values.shape[:-1], topk), dtype=torch.int64)


_KERNELS: dict[str, Any] = {
    "memory.tables.dimension_wise.lookup_reduce": _lookup_reduce,
    "memory.tables.replicated.lookup_reduce": _lookup_reduce,
    "memory.retrieval.keys.side_topk": _side_topk,
    "kernels.tucker_topk.eager.largest": _largest,
}


class _RowsAtHome:
    """A number-wise table's rows after the exchange, whose sizes depend on the data."""

    pauses = 0

    def __init__(self, num_values: int, num_groups: int) -> None:
        self.whole = ReplicatedReader(num_values, num_groups)
        self.num_values = num_values

    def read(self, part: Tensor, addresses: Tensor, scores: Tensor) -> Steps:
        """See TableReader.read; the picked rows are kept, as if all were at home."""
        rows = part.new_empty(addresses.numel(), part.shape[1]).requires_grad_()
        kept = _Kept.apply((1,), part.dtype, False, rows)
        pooled = yield from self.whole.read(part, addresses, scores)
        return pooled + kept
