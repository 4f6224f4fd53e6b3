"""Attention over a paged cache beside softmax written out, one request at a time."""

from types import SimpleNamespace

import pytest
import torch

from tests.closeness import assert_close, rounding
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.patches.cpu.paged_attention import _paged_attention

_HEADS, _GROUPS, _WIDTH, _BLOCK = 4, 2, 8, 4
_KEYS, _QUERIES = [9, 3], [5, 1]  # two requests, of three blocks and one


# A score over the width, its exponential, the sum over keys twice: of weights and of values.
_ROUNDING = rounding(torch.float32, _WIDTH + 1 + 2 * max(_KEYS))


def _attend(sink=None, window=None):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(sum(_QUERIES) + 2, 1, _HEADS, _WIDTH, generator=generator)  # two of padding
    k, v = torch.randn(2, 6, _BLOCK, _GROUPS, _WIDTH, generator=generator)
    table = torch.tensor([[4, 0, 2], [5, -1, -1]])
    attention = SimpleNamespace(config=SimpleNamespace(window_size=window))
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
def test_like_softmax_over_the_keys_before(sink):
    q, k, v, table, starts, out = _attend(sink)
    for request, (keys, queries) in enumerate(zip(_KEYS, _QUERIES, strict=True)):
        for query in range(queries):
            row = int(starts[request]) + query
            seen = keys - queries + query + 1
            for head in range(_HEADS):
                group = head * _GROUPS // _HEADS
                places = [(table[request, i // _BLOCK], i % _BLOCK) for i in range(seen)]
                own_k, own_v = (torch.stack([c[b, i, group] for b, i in places]) for c in (k, v))
                weights = (own_k @ q[row, 0, head] * _WIDTH**-0.5).exp()
                total = weights.sum() + (0 if sink is None else sink[head].exp())
                assert_close(out[row, 0, head], weights @ own_v / total, _ROUNDING)
    assert not out[sum(_QUERIES) :].any()


def test_windows_are_refused():
    with pytest.raises(UltraMemError, match=r"--window-size \(8, 0\) with dynamic batching"):
        _attend(window=(8, 0))
