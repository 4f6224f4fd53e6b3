"""Statistics of a forward: by hand, and every implementation against the reference."""

import os

import pytest
import torch

from tests.closeness import assert_close, rounding
from tests.kernels.compiler import NATIVE
from ultramem_megatron.kernels.read_statistics import (
    Counting,
    add_statistics,
    add_statistics_reference,
)

TRITON = ["triton"] if os.environ.get("TRITON_INTERPRET") else []


@pytest.fixture(params=["reference", NATIVE, *TRITON])
def forced(request, monkeypatch):
    """Each implementation in turn."""
    monkeypatch.setenv("ULTRAMEM_KERNELS", request.param)
    return request.param


def test_by_hand(forced):
    sums, hits = torch.ones(4), torch.zeros(3, dtype=torch.int32)
    query = torch.tensor([[1.0, 0.0], [3.0, 4.0]]).view(2, 1, 1, 2)
    scores = torch.tensor([[5.0, 1.0], [3.0, -1.0]]).view(2, 2, 1)
    output = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    counting = Counting(3, 3, 0, 1)
    addresses = torch.tensor([[0, 5], [2, 3]])  # rows 0, 2, 2, 0
    add_statistics(sums, hits, counting, addresses, query, scores, output, 2)
    assert hits.tolist() == [2, 0, 2]
    wanted = 1 + torch.tensor([4.0, 2.0, (14 / 3) ** 0.5, 0.6])
    assert_close(sums, wanted, rounding(torch.float32, 8))


def test_no_tokens_add_nothing(forced):
    sums, hits = torch.ones(4), torch.ones(3, dtype=torch.int32)
    none = (torch.zeros(0, 2).long(), torch.zeros(0, 1, 2, 4), torch.zeros(0, 2, 1))
    add_statistics(sums, hits, Counting(3, 3, 0, 1), *none, torch.zeros(0, 8), 2)
    assert (sums == 1).all()
    assert (hits == 1).all()


@pytest.mark.parametrize("sizes", [(1, 1, 1, 3, 8), (5, 2, 3, 7, 20), (700, 1, 2, 30, 24)], ids=str)
@pytest.mark.parametrize("counting", [Counting(50, 50, 0, 1), Counting(50, 8, 8, 31)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_the_reference_in_float64(forced, dtype, sizes, counting):
    tokens, queries, cores, width, hidden = sizes
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3

    query, output = draw(tokens, queries, 2, width).to(dtype), draw(tokens, hidden).to(dtype)
    scores = draw(tokens, 12, cores).float()
    addresses = torch.randint(150, (tokens, 12), generator=generator)
    functions = ((add_statistics, None), (add_statistics_reference, torch.float64))
    results = []
    for function, kind in functions:
        hits = torch.ones(counting.own + counting.shared).int()
        sums = torch.ones(4, dtype=kind or torch.float32)
        given = (x if kind is None else x.to(kind) for x in (query, scores, output))
        function(sums, hits, counting, addresses, *given, 4)
        results.append((sums, hits))
    (sums, hits), (wanted, counts) = results
    assert torch.equal(hits, counts)
    assert_close(sums.double(), wanted, rounding(torch.float32, tokens * hidden))
