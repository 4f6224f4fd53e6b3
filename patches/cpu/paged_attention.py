"""Megatron's dynamic batching without FlashAttention: attention over a paged cache by our kernels.

Its context keeps keys and values in blocks that belong to requests; FlashAttention reads them
there. It has no wheel to install; without it PyTorch reads on a CPU, Triton kernels on a GPU.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ultramem_megatron.kernels.paged_attention import Requests, paged_attention
from ultramem_megatron.patches.cpu.devices import without_cuda
from ultramem_megatron.patches.patch import Editor, Patch

_ATTENTION = "megatron.core.transformer.attention"
_METHOD = f"{_ATTENTION}.Attention.flash_decode_and_prefill"
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
_PACKAGES = ("flash_attn", "flash_attn_3", "flashattn_hopper")
"""Those that megatron/core/transformer/attention.py takes it from."""


def without_flash_attention() -> bool:
    """Whether dynamic batching has no attention of its own here."""
    return without_cuda() or not any(map(find_spec, _PACKAGES))


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
    scale = getattr(self, "softmax_scale", None) or q.shape[-1] ** -0.5
    requests = Requests(cu_seqlens_q, seqlens_k, block_table, int(max_seqlen_q))
    if is_decode_only:
        count = len(seqlens_k)
        each = len(q) // count
        starts = torch.arange(0, (count + 1) * each, each, device=q.device, dtype=torch.int32)
        requests = requests._replace(starts=starts, most=each)
    window = _window(self.config, self.layer_number)
    out = paged_attention(q.squeeze(1), k, v, requests, scale, softmax_offset, window)
    return out.unsqueeze(1)


def _window(config: Any, layer_number: int) -> int | None:
    """So many keys before its own are seen in this layer, None: all."""
    from megatron.core.transformer.utils import is_layer_window_attention

    windows = config.window_size, config.window_attn_skip_freq
    if not is_layer_window_attention(*windows, layer_number) or config.window_size[0] < 0:
        return None
    return int(config.window_size[0])


def _install(editor: Editor) -> None:
    editor.replace(_METHOD, _paged_attention, _PARAMETERS)
    # An assertion asks for FlashAttention's version before that method is called.
    editor.replace(
        f"{_ATTENTION}.is_fa_min_version",
        lambda version, check_equality=True: True,
        ("version", "check_equality"),
    )


PATCH = Patch(
    name="cpu.paged_attention",
    symbols=(_METHOD, f"{_ATTENTION}.is_fa_min_version"),
    reason="Dynamic batching calls FlashAttention; there is no other backend.",
    delete_when="Megatron's dynamic batching has an attention that needs no package.",
    install=_install,
    active=without_flash_attention,
    versions=">=0.19",
)
