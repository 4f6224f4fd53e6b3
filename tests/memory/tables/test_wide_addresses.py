"""A memory with more virtual values than 32 bits number: E*N = 1024 * 1449^2, just above 2^31."""

import torch

from tests.layers import HIDDEN, small_layer
from tests.ranks import init_gloo, run_on_ranks
from ultramem_megatron.communication.pausing import run
from ultramem_megatron.memory.tables.partitions import PARTITIONS
from ultramem_megatron.memory.tables.replicated import ReplicatedReader
from ultramem_megatron.memory.tables.settings import exchange_of

_SIDE, _GROUPS, _TOKENS = 1449, 1024, 3
_SIZES = {"num_keys": _SIDE, "value_expansion": _GROUPS, "value_dim": 2, "topk": 4, "key_dim": 4}


def test_a_layer_reads_the_rows_its_addresses_name():
    layer = small_layer(torch.float32, **_SIZES).eval()
    number = layer.config.num_values
    assert layer.config.value_expansion * number > 2**31
    query = layer.query(torch.randn(200, HIDDEN))
    grid, scores = layer.retrieve(query)
    row, column = grid // layer.config.keys_per_side, grid % layer.config.keys_per_side
    assert (row * layer.config.keys_per_side + column).max() > 2**31  # the grid's last corner
    addresses = layer.locate(grid)
    assert 2**31 < addresses.max() < layer.config.keys_per_side**2
    pooled = run(layer.values(addresses, scores, torch.empty(200, HIDDEN)))
    by_core = layer.values.weight[addresses % number].unflatten(-1, (layer.config.cores, -1))
    weighted = (by_core * scores.unsqueeze(-1)).flatten(2)  # (T, P, Dv)
    expected = torch.zeros_like(pooled)
    expected.scatter_add_(1, (addresses // number).unsqueeze(-1).expand_as(weighted), weighted)
    torch.testing.assert_close(pooled, expected)


def _shared(partition):
    import torch.distributed as dist

    rank, size = init_gloo()
    config = small_layer(torch.float32, num_keys=6).config
    kind = PARTITIONS[partition]
    layout = kind.layout(_SIDE**2, 4, 2, size, rank)
    generator = torch.Generator().manual_seed(5)
    table = torch.randn(_SIDE**2, 4, generator=generator)
    last = _GROUPS * _SIDE**2
    addresses = last - 1 - torch.randint(2**20, (size, _TOKENS, 5), generator=generator)
    scores = torch.randn(size, _TOKENS, 5, 2, generator=generator)
    exchange = exchange_of(config, size, 4)
    reader = kind.reader(layout, _GROUPS, dist.group.WORLD, exchange)
    rows, columns = layout.rows(), layout.columns()
    part = table[rows.start : rows.stop, columns.start : columns.stop]
    found = run(reader.read(part, addresses[rank], scores[rank]))
    whole = ReplicatedReader(_SIDE**2, _GROUPS)
    return found, run(whole.read(table, addresses[rank], scores[rank]))


def test_shared_tables_are_asked_for_them():
    for partition in ("dimension", "number"):
        for found, expected in run_on_ranks(2, _shared, partition):
            assert expected.abs().sum() > 0
            torch.testing.assert_close(found, expected)
