"""Attention without numbers: with it a model runs on the meta device, forward and backward.

Memories do so by themselves (`kernels/shapes.py`).
"""

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from ultramem_megatron.kernels.shapes import kept_for_backward


def shapes_only(chunks: list[Any]) -> list[int]:
    """Let the model chunks, which are on the meta device, run there.

    Returns a list to which every attention's forward pass adds the bytes of its keys and values.
    Attention keeps queries, keys, values and output, as a flash attention does, not the scores.
    """
    attended: list[int] = []
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, DotProductAttention):
                module.forward = attention_of_shapes(attended)
        rotary = getattr(chunk, "rotary_pos_emb", None)
        if rotary is not None:
            rotary.inv_freq = rotary.inv_freq.to("meta")
    return attended


def attention_of_shapes(attended: list[int]) -> Callable[..., Any]:
    """A forward of DotProductAttention; adds the bytes of its keys and values to the list."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Any:
        """(sequence, batch, heads, width) to (sequence, batch, heads * width)."""
        attended.append(k.nbytes + v.nbytes)
        shape = (*q.shape[:2], q.shape[2] * v.shape[3])
        return kept_for_backward(shape, q.dtype, q, k, v, keep_result=True)

    return attention
