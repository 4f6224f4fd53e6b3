"""Figures of reads are those of one rank on every layout of a table, and no rank has all counts."""

import pytest
import torch

from tests.layers import HIDDEN, small_config
from tests.ranks import init_gloo, run_on_ranks

_TOKENS = 24
_CUTS = ("replicated", "number", "dimension")


def _on_a_rank():
    """By cut, metrics of two ranks together; "alone": of one with all tokens; parts of counters."""
    import torch.distributed as dist

    rank, world = init_gloo()
    alone = [dist.new_group([other]) for other in range(world)][rank]
    x = torch.randn(_TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    own = x.chunk(world)[rank]
    found = {cut: _metrics(cut, own, dist.group.WORLD, alone) for cut in _CUTS}
    return found | {"alone": _metrics("replicated", x, alone, alone), "parts": _parts()}


def _metrics(cut, x, data_group, alone):
    from ultramem_megatron.megatron.metrics import MemoryMonitor
    from ultramem_megatron.memory.layer import UltraMemLayer
    from ultramem_megatron.memory.values.pooled import PooledValues

    config = small_config(num_keys=12)
    values = PooledValues(config, cut, None if cut == "replicated" else data_group)
    layer = UltraMemLayer(config, hidden_size=HIDDEN, num_layers=2, values=values)
    monitor = MemoryMonitor({1: layer}, config, data_group=data_group, pipeline_group=alone)
    kept = []
    layer(x)
    metrics = monitor.collect(lambda _, reads, __: kept.append(_histogram(reads)))
    return {name: metrics[1][name] for name in ("values used", "usage KL")}, kept[0]


def _histogram(reads):
    numbers, least, most = reads.histogram(torch.tensor([1, 2, 4]))
    return numbers.tolist(), float(least), float(most), reads.figures.squares


def _parts():
    """Of 2^28 values, every third counter at 2: a rank's part, share used, all counters."""
    import torch.distributed as dist

    from ultramem_megatron.megatron.reads_of_values import ReadsOfValues
    from ultramem_megatron.memory.read_counts import counters

    kind = counters(2**28)
    hits = torch.zeros(kind.number, dtype=torch.int32)
    hits[::3] = 1  # on each of two ranks
    reads = ReadsOfValues(hits, kind, float(2 * hits.sum()), torch.device("cpu"), dist.group.WORLD)
    return len(reads.part), reads.figures.used, kind.number


@pytest.fixture(scope="module")
def ranks():
    return run_on_ranks(2, _on_a_rank)


@pytest.mark.parametrize("cut", _CUTS)
def test_every_cut_says_what_one_rank_says(ranks, cut):
    (expected, histogram) = ranks[0]["alone"]
    assert 0 < expected["values used"] < 1
    for rank in ranks:
        found, its_histogram = rank[cut]
        assert found == pytest.approx(expected, rel=1e-12)
        assert its_histogram == histogram
    numbers, least, most, squares = histogram
    assert sum(numbers) == 144
    assert numbers[0] == pytest.approx(144 * (1 - expected["values used"]))
    assert least == 0 < most
    assert squares >= most**2


def test_a_rank_gets_its_part_of_a_bounded_number_of_counters(ranks):
    for rank in ranks:
        part, used, number = rank["parts"]
        assert part == number // 2
        assert used == pytest.approx(1 / 3, abs=1e-6)
