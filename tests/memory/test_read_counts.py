"""Counters of reads: exact for a table of some size, near it for a larger one, never more."""

import math

import pytest
import torch

from tests.layers import small_config
from ultramem_megatron.memory.observations import MemoryStatistics
from ultramem_megatron.memory.read_counts import MOST, Sums, counters, figures, sums
from ultramem_megatron.memory.retrieval.retrieved import Retrieved

_VALUES, _COUNTERS = 400 * 400, 2**15


def _figures(counts, kind):
    reads = float(counts.sum())
    return figures(sums(counts, 0, kind, reads), kind, reads)


@pytest.mark.parametrize(
    ("counts", "used", "divergence"),
    [([5, 5, 5, 5], 1.0, 0.0), ([8, 0, 0, 0], 0.25, math.log(4)), ([4, 4, 0, 0], 0.5, math.log(2))],
)
def test_figures_of_few_values_are_exact(counts, used, divergence):
    squares = sum(count**2 for count in counts)
    found = _figures(torch.tensor(counts), counters(4))
    assert found == pytest.approx((used, divergence, squares))


def test_nothing_read_has_no_divergence():
    found = _figures(torch.zeros(4, dtype=torch.int64), counters(4))
    assert (found.used, found.squares) == (0, 0)
    assert math.isnan(found.divergence)


def test_sums_add_up_over_parts_of_the_counters():
    kind = counters(_VALUES, _COUNTERS)
    counts = torch.randint(0, 90, (kind.number,), generator=torch.Generator().manual_seed(0))
    reads = float(counts.sum())
    parts = [
        sums(part, start, kind, reads)
        for start, part in zip((0, 7, 20_000), counts.split([7, 19_993, 12_768]), strict=True)
    ]
    added = Sums(*(sum(each[1:], each[0]) for each in zip(*parts, strict=True)))
    assert figures(added, kind, reads) == pytest.approx(_figures(counts, kind))


def _reads(kind, count=400_000):
    """Rows read, by how reads are spread over the key grid."""
    generator = torch.Generator().manual_seed(3)
    side = 400
    power = torch.arange(1, side + 1, dtype=torch.float64) ** -0.8
    lines = [power[torch.randperm(side, generator=generator)] for _ in range(2)]
    if kind == "even":
        return torch.randint(0, _VALUES, (count,), generator=generator)
    if kind == "some rows and columns":
        row, column = (torch.multinomial(p, count, True, generator=generator) for p in lines)
        return row * side + column
    few = torch.randint(0, _VALUES, (12,), generator=generator)
    return few[torch.randint(0, 12, (count,), generator=generator)]


@pytest.mark.parametrize("spread", ["even", "some rows and columns", "twelve values"])
def test_figures_of_a_sample_are_near_those_of_all_values(spread):
    rows, kind = _reads(spread), counters(_VALUES, _COUNTERS)
    exact = _figures(rows.bincount(minlength=_VALUES), counters(_VALUES))
    found = _figures(kind.of(rows).bincount(minlength=kind.number), kind)
    # 2^14 of 160,000 values: three standard deviations of a share of one half are 1.2 points; with
    # the 2^21 of a real table errors are eleven times smaller.
    assert found.used == pytest.approx(exact.used, abs=0.012)
    assert found.divergence == pytest.approx(exact.divergence, abs=0.1)
    assert found.squares == pytest.approx(exact.squares, rel=0.1)


def test_no_two_values_share_one_of_the_own_counters():
    kind = counters(_VALUES, _COUNTERS)
    counts = kind.of(torch.arange(_VALUES)).bincount(minlength=kind.number)
    assert (counts[: kind.own] == 1).all()
    assert counts[kind.own :].max() <= -(-(_VALUES - kind.own) // kind.shared)


@pytest.mark.parametrize("num_values", [MOST + 1, 10**9, 10**13])
def test_counters_do_not_grow_with_the_table(num_values):
    statistics = MemoryStatistics(num_values)
    rows = torch.randint(0, num_values, (16, 10), generator=torch.Generator().manual_seed(0))
    retrieved = Retrieved(rows, torch.ones(16, 10, 1))
    query, out = torch.randn(16, 1, 2, 4), torch.randn(16, 8)
    statistics.record(query, retrieved, rows, out, small_config().topk)
    _, _, hits = statistics.take()
    assert hits.numel() <= MOST
    assert hits.sum() == rows.numel()
