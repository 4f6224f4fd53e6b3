"""Attention over a paged cache beside softmax written out, one request at a time."""

from types import SimpleNamespace

import pytest
import torch

from tests.closeness import assert_close, rounding
from ultramem_megatron.patches.cpu.paged_attention import _paged_attention

_HEADS, _GROUPS, _WIDTH, _BLOCK = 4, 2, 8, 4
_KEYS, _QUERIES = [9, 3], [5, 1]  # two requests, of three blocks and one


# A score over the width, its exponential, the sum over keys twice: of weights and of values.
_ROUNDING = rounding(torch.float32, _WIDTH + 1 + 2 * max(_KEYS))


def _attend(sink=None, window=None, skip=None):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(sum(_QUERIES) + 2, 1, _HEADS, _WIDTH, generator=generator)  # two of padding
    k, v = torch.randn(2, 6, _BLOCK, _GROUPS, _WIDTH, generator=generator)
    table = torch.tensor([[4, 0, 2], [5, -1, -1]])
    config = SimpleNamespace(window_size=window, window_attn_skip_freq=skip)
    attention = SimpleNamespace(config=config, layer_number=2)
    starts = torch.tensor([0, *torch.tensor(_QUERIES).cumsum(0)])
    out = _paged_attention(
        attention,
        q,
        k,
        v,
        max(_QUERIES),
        max(_KEYS),
        starts,
        None,
        torch.tensor(_KEYS),
        table,
        False,
        sink,
    )
    return q, k, v, table, starts, out


@pytest.mark.parametrize("sink", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])])
@pytest.mark.parametrize(
    ("window", "skip", "most"),
    [(None, None, 9), ((2, 0), None, 3), ((-1, 0), None, 9), ((2, 0), 2, 9), ((2, 0), [0, 1], 3)],
)
def test_like_softmax_over_the_keys_before(sink, window, skip, most):
    q, k, v, table, starts, out = _attend(sink, window, skip)
    for request, (keys, queries) in enumerate(zip(_KEYS, _QUERIES, strict=True)):
        for query in range(queries):
            row = int(starts[request]) + query
            end = keys - queries + query + 1
            seen = range(max(0, end - most), end)
            for head in range(_HEADS):
                group = head * _GROUPS // _HEADS
                places = [(table[request, i // _BLOCK], i % _BLOCK) for i in seen]
                own_k, own_v = (torch.stack([c[b, i, group] for b, i in places]) for c in (k, v))
                weights = (own_k @ q[row, 0, head] * _WIDTH**-0.5).exp()
                total = weights.sum() + (0 if sink is None else sink[head].exp())
                assert_close(out[row, 0, head], weights @ own_v / total, _ROUNDING)
    assert not out[sum(_QUERIES) :].any()
