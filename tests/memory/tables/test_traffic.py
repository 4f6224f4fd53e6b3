"""The cost model: the paper's figures, its own consistency, and the choice."""

from dataclasses import replace

import pytest

from ultramem_megatron.memory.tables import dimension_wise, number_wise
from ultramem_megatron.memory.tables.number_wise import pools_at_owner
from ultramem_megatron.memory.tables.partitions import PARTITIONS, choose
from ultramem_megatron.memory.tables.traffic import (
    Exchange,
    Volume,
    distinct,
    paper_crossover,
    seconds_per_token,
)


@pytest.mark.parametrize(("size", "expected"), [(8, 22), (64, 192), (256, 775)])
def test_crossover_of_figure_9(size, expected):
    assert paper_crossover(size, 84) == pytest.approx(expected, abs=0.6)


@pytest.mark.parametrize(("size", "picks"), [(8, 84), (64, 42), (512, 160)])
def test_crossover_is_where_the_papers_volumes_are_equal(size, picks):
    """Section 4: number-wise 4M(P-1)/P + 2Mv(P-1)/P, dimension-wise 6M(P-1) + 2v(P-1)/P."""
    v = paper_crossover(size, picks)
    number = 4 * picks / size + 2 * picks * v / size
    dimension = 6 * picks + 2 * v / size
    assert number == pytest.approx(dimension, rel=1e-12)


def test_volumes_are_the_papers_where_values_are_not_expanded():
    x = Exchange(size=16, picks=84, value_dim=1024, expansion=1, cores=1)
    assert dimension_wise.volume(x).forward == pytest.approx(6 * 84 * 15 + 2 * 1024 * 15 / 16)
    rows = 4 * 84 * 15 / 16 + 2 * 84 * 1024 * 15 / 16
    assert number_wise.volume_of_rows(x).forward == pytest.approx(rows)


def test_scores_move_for_every_core_whose_columns_a_rank_holds():
    x = Exchange(size=4, picks=10, value_dim=64, expansion=9, cores=8, number_bytes=2)
    addresses, pooled = 4 * 10 * 3, 2 * 9 * 64 * 3 / 4
    scores = 2 * 2 * 10 * 3  # of two of the eight cores
    assert dimension_wise.volume(x)[:2] == (addresses + scores + pooled, scores + pooled)
    few = replace(x, cores=2)  # fewer than ranks: each holds a part of one
    assert dimension_wise.volume(few)[:2] == (addresses + scores / 2 + pooled, scores / 2 + pooled)


def test_sums_move_once_for_each_owner_and_group_that_is_asked():
    x = Exchange(size=4, picks=10, value_dim=64, expansion=9, cores=8, number_bytes=2)
    addresses, scores = 2 * 4 * 10 * 3 / 4, 2 * 8 * 10 * 3 / 4
    sums = 2 * 64 * distinct(4 * 9, 10) * 3 / 4
    assert number_wise.volume_of_sums(x)[:2] == (addresses + scores + sums, scores + sums)


def test_seconds_are_those_of_the_node_and_of_the_network():
    x = Exchange(
        size=16, picks=1, value_dim=1, ranks_per_node=4, node_bandwidth=300, network_bandwidth=12
    )
    # Of 15 others 3 are in the node.
    assert seconds_per_token(Volume(1000, 500), x) == pytest.approx(300 / 300 + 1200 / 12)
    inside = replace(x, ranks_per_node=64)
    assert seconds_per_token(Volume(1000, 500), inside) == pytest.approx(1500 / 300)


def test_nothing_moves_on_one_rank():
    x = Exchange(size=1, picks=84, value_dim=1024)
    for volume in (dimension_wise.volume(x), number_wise.volume(x)):
        assert volume.total == seconds_per_token(volume, x) == 0


_FLAT = {"ranks_per_node": 1}  # all links alike


def test_few_ranks_are_dimension_wise_and_many_number_wise():
    assert choose(Exchange(size=8, picks=84, value_dim=1024)) == "dimension"
    assert choose(Exchange(size=512, picks=84, value_dim=1024, **_FLAT)) == "number"
    assert choose(Exchange(size=128, picks=84, value_dim=128, **_FLAT)) == "number"


def test_many_nodes_are_a_grid():
    assert choose(Exchange(size=512, picks=84, value_dim=1024)) == "grid"
    assert choose(Exchange(size=128, picks=84, value_dim=128)) == "grid"
    even = Exchange(size=64, picks=84, value_dim=1024, node_bandwidth=1, network_bandwidth=1)
    assert choose(even) == "dimension"
    assert choose(replace(even, network_bandwidth=0.1)) == "grid"


@pytest.mark.parametrize("node", [1, 64])
def test_a_grid_of_one_node_or_of_nodes_of_one_is_another_partition(node):
    for picks in (2, 84):
        x = Exchange(size=64, picks=picks, value_dim=1024, ranks_per_node=node)
        other = PARTITIONS["dimension" if node == 1 else "number"]
        of_grid, volume = PARTITIONS["grid"].volume(x), other.volume(x)
        assert of_grid[:2] == volume[:2]
        assert seconds_per_token(of_grid, x) == seconds_per_token(volume, x)
        assert choose(x) != "grid"


def test_of_a_grid_only_pooled_slices_and_what_asks_for_them_cross_the_network():
    """4 nodes of 8: each token's addresses and scores to 3 others, E vectors home."""
    x = Exchange(size=32, picks=10, value_dim=64, expansion=9, cores=4, number_bytes=2)
    volume = PARTITIONS["grid"].volume(x)
    far = volume.forward - volume.near[0], volume.backward - volume.near[1]
    addresses, scores, pooled = 4 * 10 * 3, 2 * 10 * 3, 2 * 9 * 64 * 3 / 4
    assert far == pytest.approx((addresses + scores + pooled, scores + pooled))
    in_node = number_wise.volume(replace(x, size=8, value_dim=16, cores=1))
    assert volume.near == (4 * in_node.forward, 4 * in_node.backward)
    again = volume.with_recomputation()
    assert again.total == volume.total + volume.forward
    assert sum(again.near) == sum(volume.near) + volume.near[0]


def test_only_what_the_sizes_allow_is_chosen():
    assert choose(Exchange(size=3, picks=84, value_dim=1024)) == "number"
    assert choose(Exchange(size=6, picks=84, value_dim=1536, cores=4)) == "number"
    few_rows = Exchange(size=512, picks=84, value_dim=1024, **_FLAT)
    assert choose(few_rows, num_values=400) == "dimension"
    assert choose(Exchange(size=12, picks=84, value_dim=1024)) == "number"  # no whole nodes of 8
    assert choose(Exchange(size=1, picks=84, value_dim=1024)) == "replicated"


def test_owners_sum_where_many_picks_meet():
    assert pools_at_owner(Exchange(size=2, picks=84, value_dim=1024))
    assert not pools_at_owner(Exchange(size=512, picks=1, value_dim=1024))


def test_distinct():
    assert distinct(1, 5) == 1
    assert distinct(10, 1) == pytest.approx(1)
    assert distinct(2, 2) == pytest.approx(1.5)
