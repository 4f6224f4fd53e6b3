"""Attention of one decode step over a cache of rotated keys, for every model alike.

Megatron's static path caches keys as they come and rotates all of them in every layer at every
step, and its local attention forks the random-number generator, which a CUDA graph refuses. Here
keys are rotated once, when they are cached, and attention is PyTorch's; weights and everything
around it are Megatron's. Nothing is read on the host and no shape depends on data.

B sequences, S places in the cache, G groups of query heads (heads of keys), Q query heads a group,
W width of a head, R <= W numbers of it that are rotated.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultramem_megatron.errors import UltraMemError

NAME = "PyTorch's, over keys rotated once"
"""What the rows of a benchmark call it."""

_PLAIN = {
    "multi_latent_attention": (False, "--multi-latent-attention"),
    "window_size": (None, "--window-size"),
    "softmax_type": ("vanilla", "--softmax-type"),
    "attention_output_gate": (False, "--attention-output-gate"),
    "apply_query_key_layer_scaling": (False, "--apply-query-key-layer-scaling"),
    "no_rope_freq": (None, "--no-rope-freq"),
    "qk_layernorm": (False, "--qk-layernorm"),
    "rotary_interleaved": (False, "--rotary-interleaved"),
}
"""Of a TransformerConfig: what this attention can do, and the flag that asks for more."""


class Requests:
    """Where the sequences of a batch stand, on the device and the same for all layers.

    positions: (B,) int64, of the tokens that a step feeds, counted from 0; raise them in place to
    go on. After `begin`: mask (B, 1, 1, S), 0 for a sequence's own places and -inf beyond; None
    where all have filled the cache. cos, sin: (B, 1, 1, R), the sine of the first half negated.
    """

    cos: Tensor | None = None
    sin: Tensor | None = None
    mask: Tensor | None = None

    def __init__(self, model: Any, lengths: Sequence[int], places: int) -> None:
        """lengths: of each sequence before the step. places: S. Raises UltraMemError."""
        self.places = places
        _refuse_others(model.config, model.position_embedding_type)
        device = next(model.parameters()).device
        self.positions = torch.tensor(lengths, device=device)
        self.rows = torch.arange(len(lengths), device=device)
        self._places = torch.arange(places, device=device)
        self._zero = torch.zeros((), device=device, dtype=model.config.params_dtype)
        self._all_full = min(lengths) == places - 1
        self._tables: tuple[Tensor, Tensor] | None = None
        if model.position_embedding_type == "rope":
            angles = model.rotary_pos_emb(places).view(places, 1, 1, -1)
            half = angles.shape[-1] // 2
            sine = torch.cat((-angles[..., :half].sin(), angles[..., half:].sin()), -1)
            dtype = model.config.params_dtype
            self._tables = angles.cos().to(dtype), sine.to(dtype)

    def begin(self) -> None:
        """What all layers of one step need of the positions."""
        if self._tables is not None:
            self.cos, self.sin = (table[self.positions] for table in self._tables)
        if not self._all_full:
            seen = self._places <= self.positions.unsqueeze(1)
            self.mask = self._zero.where(seen, float("-inf")).view(len(seen), 1, 1, -1)

    def rotate(self, heads: Tensor) -> Tensor:
        """(B, G, heads, W) at these positions, as Megatron's rotary embedding does."""
        if self.cos is None or self.sin is None:
            return heads
        turning, rest = heads.tensor_split([self.cos.shape[-1]], -1)
        first, second = turning.chunk(2, -1)
        turned = torch.addcmul(turning * self.cos, torch.cat((second, first), -1), self.sin)
        return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


class CachedAttention(nn.Module):
    """In place of a layer's self attention, with its weights; one token of each sequence."""

    requests: Requests
    keys: Tensor
    values: Tensor

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.linear_qkv, self.linear_proj = attention.linear_qkv, attention.linear_proj
        self.scale: float | None = attention.config.softmax_scale  # None: 1 / sqrt(W)

    def attend_to(self, requests: Requests, keys: Tensor, values: Tensor) -> None:
        """keys, values: (B, S, G, W), the layer's cache, which steps write into."""
        self.requests, self.keys, self.values = requests, keys, values

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states: (1, B, D). Returns the same shape and its bias, as Megatron's does."""
        requests = self.requests
        batch, _length, groups, width = self.keys.shape
        mixed = self.linear_qkv(hidden_states)[0].view(batch, groups, -1, width)
        turned = requests.rotate(mixed[:, :, :-1])
        where = requests.rows, requests.positions
        self.keys.index_put_(where, turned[:, :, -1])
        self.values.index_put_(where, mixed[:, :, -1])
        # A group's queries stand where others have a sequence's: none of its keys is repeated.
        out = F.scaled_dot_product_attention(
            turned[:, :, :-1],
            self.keys.transpose(1, 2),
            self.values.transpose(1, 2),
            attn_mask=requests.mask,
            scale=self.scale,
        )
        projected: tuple[Tensor, Tensor | None] = self.linear_proj(out.reshape(1, batch, -1))
        return projected


def cached_attentions(model: Any) -> list[CachedAttention]:
    """Those of the model's layers, which get them at the first call."""
    layers = model.decoder.layers
    for layer in layers:
        if not isinstance(layer.self_attention, CachedAttention):
            layer.self_attention = CachedAttention(layer.self_attention)
    return [layer.self_attention for layer in layers]


def _refuse_others(config: Any, positions: str) -> None:
    for name, (plain, flag) in _PLAIN.items():
        given = getattr(config, name)
        if given != plain:
            raise UltraMemError(
                f"{flag} ({given}): the decode benchmark's attention has it not. Leave it out."
            )
    if positions not in ("rope", "learned_absolute", "none"):
        raise UltraMemError(
            f"--position-embedding-type {positions}: the decode benchmark knows rope, "
            f"learned_absolute and none. Use one of these."
        )
