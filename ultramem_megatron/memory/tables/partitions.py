"""The ways to cut a value table, each a file with its place in this list, and the cheapest."""

from ultramem_megatron.memory.tables import dimension_wise, number_wise, replicated
from ultramem_megatron.memory.tables.contract import Partition
from ultramem_megatron.memory.tables.traffic import Exchange, seconds_per_token

PARTITIONS: dict[str, Partition] = {
    partition.name: partition
    for partition in (replicated.PARTITION, dimension_wise.PARTITION, number_wise.PARTITION)
}
"""By name; where costs are equal the earlier is chosen."""


def shared_partitions() -> dict[str, Partition]:
    """Those that cut a table, by the word after --ultramem-partition."""
    return {name: kind for name, kind in PARTITIONS.items() if kind is not replicated.PARTITION}


def choose(x: Exchange, num_values: int | None = None) -> str:
    """Name of the partition that moves a table's reads fastest, of those that the sizes allow.

    num_values: N, by default as many as any partition may need.
    """
    rows = x.size if num_values is None else num_values
    fitting = [kind for kind in PARTITIONS.values() if kind.fits(x, rows)]
    # Where none fits, the last one's check says why.
    candidates = fitting or [*PARTITIONS.values()][-1:]
    return min(candidates, key=lambda kind: seconds_per_token(kind.volume(x), x)).name
