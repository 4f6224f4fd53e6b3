"""Megatron's dynamic batching where there is no CUDA: attention over a paged cache in PyTorch.

Its context keeps keys and values in blocks that belong to requests; FlashAttention reads them
there, and a Triton kernel writes them. Here PyTorch reads, request by request, and upstream's own
fallback writes.
"""

from typing import Any

import torch
from torch import Tensor

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.patches.cpu.devices import without_cuda
from ultramem_megatron.patches.patch import Editor, Patch

_ATTENTION = "megatron.core.transformer.attention"
_METHOD = f"{_ATTENTION}.Attention.flash_decode_and_prefill"
_APPEND = "megatron.core.inference.contexts.dynamic_context.triton_append_key_value_cache"
_PARAMETERS = (
    "self",
    "q",
    "k",
    "v",
    "max_seqlen_q",
    "max_seqlen_k",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqlens_k",
    "block_table",
    "is_decode_only",
    "softmax_offset",
)


def _paged_attention(
    self: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqlens_k: Tensor,
    block_table: Tensor,
    is_decode_only: bool,
    softmax_offset: Tensor | None = None,
) -> Tensor:
    """Causal attention of packed queries (T, 1, heads, width); k, v: (blocks, size, groups, ...).

    Of n requests, request r has queries cu_seqlens_q[r] to [r+1] (when all decode: T/n each), the
    last of its seqlens_k[r] keys, which lie in the blocks block_table[r]. Returns the shape of q;
    queries of no request get zeros. softmax_offset: logit of a sink, one for each head.
    """
    if self.config.window_size is not None:
        raise UltraMemError(
            f"--window-size {self.config.window_size} with dynamic batching needs FlashAttention, "
            f"thus a GPU. Use static batching."
        )
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    scale = getattr(self, "softmax_scale", None) or q.shape[-1] ** -0.5
    requests = len(seqlens_k)
    each = len(q) // requests
    starts = [r * each for r in range(requests + 1)] if is_decode_only else cu_seqlens_q.tolist()
    for blocks, keys, start, end in zip(
        block_table.long(), seqlens_k.tolist(), starts[:-1], starts[1:], strict=True
    ):
        if end == start or keys == 0:
            continue
        own_k, own_v = (
            cache[blocks].flatten(0, 1)[:keys].repeat_interleave(q.shape[2] // cache.shape[2], 1)
            for cache in (k, v)
        )
        scores = torch.einsum("qhd,khd->hqk", q[start:end, 0], own_k).float() * scale
        positions = torch.arange(keys)
        scores.masked_fill_(positions > positions[keys - (end - start) :, None], float("-inf"))
        weights = scores.softmax(-1)
        if softmax_offset is not None:
            sink = scores.logsumexp(-1) - softmax_offset[:, None].float()
            weights = weights * sink.sigmoid().unsqueeze(-1)
        out[start:end, 0] = torch.einsum("hqk,khd->qhd", weights.to(q.dtype), own_v)
    return out


def _install(editor: Editor) -> None:
    editor.replace(_METHOD, _paged_attention, _PARAMETERS)
    # An assertion asks for FlashAttention's version before that method is called.
    editor.replace(
        f"{_ATTENTION}.is_fa_min_version",
        lambda version, check_equality=True: True,
        ("version", "check_equality"),
    )
    editor.replace(_APPEND, None)


PATCH = Patch(
    name="cpu.dynamic_batching",
    symbols=(_METHOD, f"{_ATTENTION}.is_fa_min_version", _APPEND),
    reason="Dynamic batching calls FlashAttention and a Triton kernel; there is no other backend.",
    delete_when="Megatron's dynamic batching has an attention that runs on a CPU.",
    install=_install,
    active=without_cuda,
    versions=">=0.19",
)
