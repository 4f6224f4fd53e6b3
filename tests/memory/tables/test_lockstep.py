"""Reading a shared table in lockstep: any numbers of tokens, and ranks that have finished."""

import pytest
import torch

from tests.closeness import assert_close, rounding
from tests.ranks import init_gloo, run_on_ranks
from ultramem_megatron.communication.pausing import run
from ultramem_megatron.memory.tables.lockstep import LockstepReader
from ultramem_megatron.memory.tables.partitions import PARTITIONS
from ultramem_megatron.memory.tables.replicated import ReplicatedReader
from ultramem_megatron.memory.tables.traffic import Exchange

_PICKS, _CORES, _GROUPS, _VALUES, _WIDTH = 5, 2, 4, 11, 8


def _tensors(rank, tokens):
    generator = torch.Generator().manual_seed(rank)
    addresses = torch.randint(_VALUES * _GROUPS, (tokens, _PICKS), generator=generator)
    scores = torch.randn(tokens, _PICKS, _CORES, generator=generator, dtype=torch.float64)
    table = torch.randn(_VALUES, _WIDTH, generator=torch.Generator().manual_seed(9))
    return table.double(), addresses, scores


def _on_rank(partition, reads):
    """What each read of this rank gave, and how many it served when it had finished."""
    import torch.distributed as dist

    rank, size = init_gloo()
    kind = PARTITIONS[partition]
    layout = kind.layout(_VALUES, _WIDTH, _CORES, size, rank)
    exchange = Exchange(size, _PICKS, _WIDTH, _GROUPS, _CORES)
    group = dist.group.WORLD
    reader = LockstepReader(kind.reader(layout, _GROUPS, group, exchange), group)
    rows, columns = layout.rows(), layout.columns()
    found = []
    for tokens in reads[rank]:
        table, addresses, scores = _tensors(rank, tokens)
        part = table[rows.start : rows.stop, columns.start : columns.stop]
        found.append(run(reader.read(part, addresses, scores)))
    served = 0
    part = _tensors(rank, 0)[0][rows.start : rows.stop, columns.start : columns.stop]
    while reader.serve(part, _PICKS, _CORES):
        served += 1
    return found, served


@pytest.mark.parametrize("partition", ["number", "dimension"])
@pytest.mark.parametrize(
    ("reads", "served"),
    [
        (((3, 1), (2, 4)), (0, 0)),
        (((3,), (2, 4, 1)), (2, 0)),
        (((), (2,)), (1, 0)),
        (((1,), (1, 0, 2)), (2, 0)),  # a read of none is a read, which the others serve
    ],
)
def test_every_rank_gets_what_it_asks_for(partition, reads, served):
    for rank, (found, count) in enumerate(run_on_ranks(2, _on_rank, partition, reads)):
        assert count == served[rank]
        for tokens, pooled in zip(reads[rank], found, strict=True):
            table, addresses, scores = _tensors(rank, tokens)
            wanted = run(ReplicatedReader(_VALUES, _GROUPS).read(table, addresses, scores))
            assert_close(pooled, wanted, rounding(torch.float64, _PICKS))
