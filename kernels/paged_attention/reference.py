"""Attention over a paged cache in the plainest form: request by request.

T queries of n requests, H heads of queries, G of keys and values, K and V their widths; blocks of B
keys.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Requests(NamedTuple):
    """Which queries are whose, and where their keys lie.

    starts (n + 1,): request r has queries starts[r] to starts[r + 1], the last of its lengths[r]
    keys, which lie in blocks[r] (n, blocks of the longest), in order. most: no request has more
    queries. Integers on the queries' device.
    """

    starts: Tensor
    lengths: Tensor
    blocks: Tensor
    most: int


def paged_attention_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    requests: Requests,
    scale: float,
    sinks: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal attention: softmax over a request's keys up to the query's own, times values.

    query (T, H, K), keys (blocks, B, G, K), values (blocks, B, G, V), of one floating dtype; head h
    reads group h * G // H. scale: of the products. sinks (H,): a logit that takes its share of the
    weights and gives nothing. window: so many keys before its own are seen by a query, None: all.
    Returns (T, H, V); queries of no request get zeros.

    A request with queries [1], keys [0, ln 3], values [4, 8] and scale 1 gets 7.
    """
    out = query.new_zeros(*query.shape[:2], values.shape[-1])
    starts = requests.starts.tolist()
    for blocks, count, start, end in zip(
        requests.blocks.long(), requests.lengths.tolist(), starts[:-1], starts[1:], strict=True
    ):
        if end == start or count == 0:
            continue
        repeat = query.shape[1] // keys.shape[2]
        own_keys, own_values = (
            cache[blocks].flatten(0, 1)[:count].repeat_interleave(repeat, 1)
            for cache in (keys, values)
        )
        scores = torch.einsum("qhd,khd->hqk", query[start:end], own_keys).float() * scale
        positions = torch.arange(count, device=query.device)
        own = positions[count - (end - start) :, None]
        hidden = positions > own
        if window is not None:
            hidden |= positions < own - window
        scores.masked_fill_(hidden, float("-inf"))
        weights = scores.softmax(-1)
        if sinks is not None:
            share = scores.logsumexp(-1) - sinks[:, None].float()
            weights = weights * share.sigmoid().unsqueeze(-1)
        out[start:end] = torch.einsum("hqk,khd->qhd", weights.to(query.dtype), own_values)
    return out
