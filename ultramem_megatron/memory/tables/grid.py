"""Grid partition: P = Pn x Pd, rows within each of Pd nodes, columns across them.

A rank holds a range of rows, 1/Pn of them, of a slice of every value, 1/Pd of it. A read is a
dimension-wise one over the ranks in this one's place in every node, and each of those reads its own
columns, for all their tokens, number-wise in its node:

    network   addresses and scores of Pd ranks' tokens come, pooled slices go home
    node      addresses and scores go to the owners of rows; rows of the slice, or their sums, back

Rows or sums are the most of what moves, one for every pick or group of picks, and stay on the links
of the node; over the network goes one vector for each group. Cut the other way, columns within a
node, rows or sums would cross the network.
"""

from dataclasses import replace
from typing import Any

from ultramem_megatron.communication.node_groups import node_groups
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.tables import dimension_wise, number_wise
from ultramem_megatron.memory.tables.contract import Partition
from ultramem_megatron.memory.tables.dimension_wise import DimensionWiseReader
from ultramem_megatron.memory.tables.layout import TableLayout
from ultramem_megatron.memory.tables.number_wise import NumberWiseReader
from ultramem_megatron.memory.tables.traffic import Exchange, Volume


def _parts(size: int, node: int) -> tuple[int, int]:
    rows = min(size, node)
    if size % rows:
        raise UltraMemError(
            f"--ultramem-partition grid with --ultramem-parallel-size {size} and "
            f"--ultramem-node-size {node} (by default the ranks of a host): the first must be a "
            f"multiple of the second. Use another size of either, or another partition."
        )
    return rows, size // rows


def _check(layout: TableLayout) -> None:
    rows, slices = layout.row_parts, layout.column_parts
    if layout.num_values < rows:
        raise UltraMemError(
            f"--ultramem-partition grid cuts the {layout.num_values} values of a table "
            f"(--ultramem-num-keys squared) over {rows} ranks of a node. Use a smaller "
            f"--ultramem-node-size or more keys."
        )
    if layout.value_dim % slices:
        raise UltraMemError(
            f"--ultramem-partition grid cuts the value dimension over {slices} nodes, but "
            f"--ultramem-value-dim {layout.value_dim} is not divisible by {slices}. Use a multiple "
            f"of it, another --ultramem-node-size, or --ultramem-partition number."
        )
    if slices % layout.cores and layout.cores % slices:
        raise UltraMemError(
            f"--ultramem-partition grid over {slices} nodes would make the slices of "
            f"--ultramem-cores {layout.cores} straddle nodes: one must divide the other. Use other "
            f"cores, another --ultramem-node-size, or --ultramem-partition number."
        )


def _reader(
    layout: TableLayout, num_groups: int, group: Any, exchange: Exchange
) -> DimensionWiseReader:
    rows = layout.row_parts
    groups = node_groups(group, rows)
    width, cores = len(layout.columns()), len(layout.cores_of(layout.rank))
    slice_layout = TableLayout(layout.num_values, width, cores, rows)
    in_node = NumberWiseReader(
        slice_layout, num_groups, groups.inside, number_wise.pools_at_owner(_in_node(exchange))
    )
    return DimensionWiseReader(layout, num_groups, groups.across, in_node)


def _in_node(x: Exchange) -> Exchange:
    """What a node exchanges to read one slice."""
    rows, slices = _parts(x.size, x.ranks_per_node)
    return replace(
        x,
        size=rows,
        value_dim=x.value_dim // slices,
        pre_dim=x.pre_dim // slices,
        cores=max(1, x.cores // slices),
    )


def volume(x: Exchange) -> Volume:
    """Dimension-wise over the network; number-wise in the node, for the tokens of all nodes."""
    slices = _parts(x.size, x.ranks_per_node)[1]
    far = dimension_wise.volume(replace(x, size=slices))
    near = number_wise.volume_of_columns(_in_node(x))
    inside = (slices * near.forward, slices * near.backward)
    return Volume(far.forward + inside[0], far.backward + inside[1], inside)


def _kept(x: Exchange) -> float:
    slices = _parts(x.size, x.ranks_per_node)[1]
    return dimension_wise.kept(replace(x, size=slices)) + slices * number_wise.kept(_in_node(x))


PARTITION = Partition(
    name="grid",
    parts=_parts,
    check=_check,
    reader=_reader,
    volume=volume,
    kept=_kept,
    waits_for_host=True,
)
