"""Attention of decoding over a paged cache, beside PyTorch's over keys that lie in order."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ultramem_megatron.kernels.paged_attention import Requests, paged_attention

_BLOCK = 256


class Decoding(NamedTuple):
    """A step of `batch` requests with `context` keys each, `heads` of queries in `groups`."""

    batch: int
    context: int
    heads: int = 16
    groups: int = 2
    width: int = 128
    dtype: torch.dtype = torch.bfloat16

    def bytes(self) -> int:
        """Keys and values, read once."""
        return 2 * self.batch * self.context * self.groups * self.width * self.dtype.itemsize


def steps(size: Decoding, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """By whose kernels: the attention of one layer, (batch, heads, width)."""
    count = -(-size.context // _BLOCK)
    generator = torch.Generator(device).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).to(size.dtype)

    order = torch.randperm(size.batch * count, device=device, generator=generator)
    table = order.int().view(size.batch, count)
    cache = draw(2, size.batch * count, _BLOCK, size.groups, size.width)
    query = draw(size.batch, size.heads, size.width)
    starts = torch.arange(size.batch + 1, device=device, dtype=torch.int32)
    lengths = torch.full((size.batch,), size.context, device=device, dtype=torch.int32)
    requests = Requests(starts, lengths, table, 1)
    in_order = cache[:, order].view(2, size.batch, -1, size.groups, size.width)
    keys, values = in_order[:, :, : size.context].transpose(2, 3).contiguous()

    def ours() -> Tensor:
        return paged_attention(query, cache[0], cache[1], requests, size.width**-0.5)

    def torchs() -> Tensor:
        one = query.unsqueeze(2)
        return scaled_dot_product_attention(one, keys, values, enable_gqa=True).squeeze(2)

    return {"paged attention": ours, "PyTorch's attention, keys in order": torchs}
