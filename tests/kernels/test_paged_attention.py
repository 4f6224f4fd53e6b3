"""Attention over a paged cache: its worked case, and the kernel against the reference."""

import math
import os

import pytest
import torch

from tests.closeness import assert_close, rounding
from ultramem_megatron.kernels.paged_attention import (
    Requests,
    paged_attention,
    paged_attention_reference,
)

TRITON = ["triton"] if os.environ.get("TRITON_INTERPRET") else []

# queries and keys of each request; heads, groups, widths, keys of a block
SIZES = [
    ([1, 1, 1], [5, 70, 1], 4, 2, 8, 8, 16),  # decoding
    ([5, 0, 1, 9], [9, 0, 33, 9], 6, 2, 20, 12, 8),  # of a group three heads
    ([40, 2], [100, 2], 2, 2, 16, 16, 256),  # a block longer than is read at a time
    ([3], [3], 1, 1, 4, 4, 3),
    ([1, 2], [700, 90], 4, 2, 8, 8, 64),  # keys of a request over several programs
]


@pytest.fixture(params=["reference", *TRITON])
def forced(request, monkeypatch):
    """Each implementation in turn."""
    monkeypatch.setenv("ULTRAMEM_KERNELS", request.param)
    return request.param


def _case(sizes, dtype):
    queries, lengths, heads, groups, width, wide, block = sizes
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    most = max(1, -(-max(lengths) // block))
    taken = [-(-length // block) for length in lengths]
    order = torch.randperm(sum(taken) + 2, generator=generator)
    blocks = torch.full((len(lengths), most), 0, dtype=torch.int32)
    keys = torch.full((len(order), block, groups, width), float("nan"), dtype=dtype)
    values = torch.full((len(order), block, groups, wide), float("nan"), dtype=dtype)
    for request, (length, count) in enumerate(zip(lengths, taken, strict=True)):
        own = order[sum(taken[:request]) :][:count]
        blocks[request, :count] = own
        for place in range(length):  # what nobody wrote stays NaN
            keys[own[place // block], place % block] = draw(groups, width)
            values[own[place // block], place % block] = draw(groups, wide)
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    requests = Requests(starts, torch.tensor(lengths).int(), blocks, max(queries))
    return draw(sum(queries) + 2, heads, width), keys, values, requests, 0.3


def test_worked_case(forced):
    keys = torch.tensor([0.0, math.log(3)]).view(1, 2, 1, 1)
    values = torch.tensor([4.0, 8.0]).view(1, 2, 1, 1)
    one = torch.tensor([0, 1]).int()
    requests = Requests(one, one[1:] + 1, one[:1, None], 1)
    out = paged_attention(torch.ones(1, 1, 1), keys, values, requests, 1.0)
    assert_close(out, torch.full((1, 1, 1), 7.0), rounding(torch.float32, 8))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    ("sinks", "window", "dtype"),
    [
        (False, None, torch.float32),
        (True, None, torch.bfloat16),
        (True, 0, torch.float32),
        (False, 70, torch.bfloat16),
    ],
)
def test_equals_the_reference_in_float64(forced, sizes, sinks, dtype, window):
    query, keys, values, requests, scale = _case(sizes, dtype)
    sink = torch.linspace(-1, 2, query.shape[1]) if sinks else None
    exact = (x.double() for x in (query, keys, values))
    wanted = paged_attention_reference(*exact, requests, scale, sink, window)
    out = paged_attention(query, keys, values, requests, scale, sink, window)
    assert out.dtype == dtype
    assert not out[requests.starts[-1] :].any()
    once = 2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0
    terms = sizes[4] + 2 * max(sizes[1])
    assert_close(out.double(), wanted, once + rounding(torch.float32, terms, condition=8))


@pytest.mark.parametrize(
    ("programs", "keys", "splits"),
    [(2, 4096, 16), (2, 65536, 64), (2, 256, 1), (2, 257, 2), (128, 4096, 4), (264, 65536, 1)],
)
def test_keys_are_spread_where_programs_are_few(programs, keys, splits):
    pytest.importorskip("triton", reason="Triton is for Linux")
    from ultramem_megatron.kernels.paged_attention.triton_kernel import splits_of

    assert splits_of(programs, keys) == splits
