"""How many ranks share a table where no flag says."""

from dataclasses import replace

import pytest

from ultramem_megatron.memory.tables.default_size import Step, default_size
from ultramem_megatron.memory.tables.traffic import Exchange

_READ = Exchange(size=1, picks=84, value_dim=1024)
_VALUES = 1000**2


def _step(ranks: int, tokens: int = 8192, tables: int = 4) -> Step:
    elements = tables * _VALUES * _READ.value_dim
    return Step(ranks, tokens * tables, elements, moved_bytes=6, held_bytes=18)


@pytest.mark.parametrize("ranks", [1, 2, 6, 48, 64])
def test_few_ranks_all_share_a_table(ranks: int) -> None:
    assert default_size(_READ, _VALUES, _step(ranks)) == ranks


@pytest.mark.parametrize(
    ("ranks", "tokens", "expected"),
    [
        (512, 2048, 128),  # few reads: the reduction weighs more
        (512, 8192, 64),
        (512, 65536, 16),
        (4096, 8192, 64),
    ],
)
def test_of_many_the_fastest_step_decides(ranks: int, tokens: int, expected: int) -> None:
    assert default_size(_READ, _VALUES, _step(ranks, tokens)) == expected


def test_a_rank_has_no_more_than_its_room() -> None:
    """16 times the tables: 64 ranks would have 18 GB each."""
    assert default_size(_READ, 16 * _VALUES, replace(_step(512), elements=2**36)) == 256
    assert default_size(_READ, 16 * _VALUES, replace(_step(512), elements=2**40)) == 512


def test_a_size_that_no_partition_takes_is_not_chosen() -> None:
    """7 values: neither 7 * 13 ranks for rows, nor 1024 columns over them."""
    assert default_size(_READ, 7, replace(_step(91), elements=2**20)) in (1, 7)


def test_slower_networks_keep_tables_in_fewer_nodes() -> None:
    slow = replace(_READ, network_bandwidth=_READ.network_bandwidth / 10)
    few_parameters = replace(_step(512), elements=2**20)
    assert default_size(slow, _VALUES, few_parameters) <= _READ.ranks_per_node
