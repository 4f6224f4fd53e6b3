"""The ways to cut a value table, each a file with its place in this list, and the cheapest."""

from typing import TYPE_CHECKING

from ultramem_megatron.memory.kinds import Kinds, Listed
from ultramem_megatron.memory.tables.traffic import Exchange, seconds_per_token

if TYPE_CHECKING:  # the list itself needs no torch
    from ultramem_megatron.memory.tables.contract import Partition

_HERE = "ultramem_megatron.memory.tables"
PARTITIONS: "Kinds[Partition]" = Kinds(
    replicated=Listed(f"{_HERE}.replicated:PARTITION", "every rank has the whole table"),
    dimension=Listed(f"{_HERE}.dimension_wise:PARTITION", "each rank has a slice of every value"),
    number=Listed(f"{_HERE}.number_wise:PARTITION", "each rank has a range of values"),
    grid=Listed(f"{_HERE}.grid:PARTITION", "number within a node, dimension across nodes"),
)
"""By name; where costs are equal the earlier is chosen."""


def shared_partitions() -> tuple[str, ...]:
    """Those that cut a table, words after --ultramem-partition."""
    return tuple(name for name in PARTITIONS if name != "replicated")


def choose(x: Exchange, num_values: int | None = None) -> str:
    """Name of the partition that moves a table's reads fastest, of those that the sizes allow.

    num_values: N, by default as many as any partition may need.
    """
    rows = x.size if num_values is None else num_values
    fitting = [kind for kind in PARTITIONS.values() if kind.fits(x, rows)]
    # Where none fits, the last one's check says why.
    candidates = fitting or [*PARTITIONS.values()][-1:]
    return min(candidates, key=lambda kind: seconds_per_token(kind.volume(x), x)).name
