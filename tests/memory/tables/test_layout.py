"""Which rank holds what."""

import pytest

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.tables.layout import TableLayout
from ultramem_megatron.memory.tables.partitions import PARTITIONS

_NUMBER, _DIMENSION = PARTITIONS["number"], PARTITIONS["dimension"]
_GRID = PARTITIONS["grid"]


@pytest.mark.parametrize(("values", "size"), [(10, 3), (16, 4), (121, 8), (5, 5)])
def test_rows_are_a_fair_cut(values, size):
    parts = [_NUMBER.layout(values, 8, 2, size, rank).rows() for rank in range(size)]
    assert [row for part in parts for row in part] == list(range(values))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_columns_are_equal_slices():
    parts = [_DIMENSION.layout(9, 12, 2, 3, rank) for rank in range(3)]
    assert [list(part.columns()) for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert parts[1].shape == (9, 4)
    assert parts[2].describe() == "rows 0-8 of 9, columns 8-11 of 12"


@pytest.mark.parametrize(
    ("cores", "size", "expected"),
    [(1, 4, [[0], [0], [0], [0]]), (2, 4, [[0], [0], [1], [1]]), (4, 2, [[0, 1], [2, 3]])],
)
def test_cores_of_a_rank(cores, size, expected):
    layout = _DIMENSION.layout(9, 8, cores, size)
    assert [list(layout.cores_of(rank)) for rank in range(size)] == expected


def test_grid_cuts_rows_in_a_node_and_columns_across():
    for size, node, parts in ((8, 2, (2, 4)), (8, 4, (4, 2)), (4, 8, (4, 1)), (4, 1, (1, 4))):
        layout = _GRID.layout(25, 24, 2, size, size - 1, node=node)
        assert (layout.row_parts, layout.column_parts) == parts
        assert (layout.rows()[-1], layout.columns()[-1]) == (24, 23)


@pytest.mark.parametrize(
    ("partition", "sizes", "message"),
    [
        ("dimension", (9, 10, 2, 4), "10 is not divisible by --ultramem-par"),
        ("dimension", (9, 12, 3, 2), "--ultramem-cores 3 straddle ranks"),
        ("number", (4, 10, 2, 5), "more than the 4 values"),
        ("replicated", (9, 12, 2, 2), "not shared, but 2 ranks"),
        ("grid", (9, 12, 2, 5), "size 5 and --ultramem-node-size 2 .* must be a multiple of"),
        ("grid", (9, 10, 2, 8), "value dimension over 4 nodes, .* 10 is not divisible by 4"),
        ("grid", (9, 12, 3, 4), "over 2 nodes .* --ultramem-cores 3 straddle nodes"),
        ("grid", (1, 12, 2, 4), "1 values of a table .* over 2 ranks of a node"),
    ],
)
def test_impossible_cuts_are_refused(partition, sizes, message):
    kind = PARTITIONS[partition]
    with pytest.raises(UltraMemError, match=message):
        kind.check(kind.layout(*sizes, node=2))


def test_rows_and_columns_are_cut_at_once():
    """Every number of the table is held by exactly one of 2 x 3 ranks; neighbours share columns."""
    parts = [TableLayout(7, 12, 2, 2, 3, rank) for rank in range(6)]
    held = [(row, column) for part in parts for row in part.rows() for column in part.columns()]
    assert sorted(held) == [(row, column) for row in range(7) for column in range(12)]
    assert parts[0].columns() == parts[1].columns() != parts[2].columns()
    assert parts[0].rows() == parts[2].rows() != parts[1].rows()
