"""Filter recall against a search through every pair, in float64."""

import math

import pytest
import torch

from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.layer import UltraMemLayer
from ultramem_megatron.memory.retrieval.filter_recall import filter_recall
from ultramem_megatron.memory.spans import Span


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_equals_a_search_through_all_pairs(rank):
    torch.manual_seed(rank)
    tokens, heads, keys, topk = 3, 2, 11, 4
    scores = torch.randn(tokens, heads, 2, rank, keys, dtype=torch.float64)
    directions = torch.randn(2, heads, rank, dtype=torch.float64)
    core = torch.randn(heads, rank, rank, dtype=torch.float64)
    shares = []
    for t in range(tokens):
        for h in range(heads):
            side = [directions[s, h] @ scores[t, h, s] for s in range(2)]
            lists = [sorted(range(keys), key=lambda k, f=f: -float(f[k]))[:topk] for f in side]
            pairs = sorted(
                (-float(scores[t, h, 0, :, i] @ core[h] @ scores[t, h, 1, :, j]), i, j)
                for i in range(keys)
                for j in range(keys)
                if side[0][i] > 0 and side[1][j] > 0
            )[:topk]
            shares.append(sum(i in lists[0] and j in lists[1] for _, i, j in pairs) / len(pairs))
    found = filter_recall(scores, directions, core, topk)
    assert float(found) == pytest.approx(sum(shares) / len(shares))
    if rank == 1 and bool((core.flatten() > 0).all()):
        assert float(found) == 1  # one rank is its own filter


def test_a_layer_measures_what_its_retrieval_misses():
    config = UltraMemConfig(
        spans=(Span(1, 1),),
        num_keys=16,
        key_dim=8,
        value_dim=8,
        topk=4,
        heads=2,
        tucker_rank=2,
        cores=2,
    )
    layer = UltraMemLayer(config, hidden_size=16, num_layers=1)
    x = torch.randn(40, 16)
    layer(x)
    assert layer.statistics.take_recall() is None  # nobody asked for it
    layer(x)
    recall = layer.statistics.take_recall()
    query = layer.query(x)[:16]
    assert torch.equal(recall, layer.retrieval.recall(query))
    # Positive cores hide little, and the picks themselves are within what passes.
    assert 0.5 < float(recall) <= 1


def test_nothing_within_reach_is_not_a_share():
    scores = -torch.ones(1, 1, 2, 1, 5)
    found = filter_recall(scores, torch.ones(2, 1, 1), torch.ones(1, 1, 1), 2)
    assert math.isnan(float(found))
