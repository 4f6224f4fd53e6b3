"""Tables that memories share, in a checkpoint: one of each kind for all groups of memories.

A group has a range of its rows, so that groups on other pipeline stages, and tables cut over other
ranks, load it as it is.
"""

from typing import NamedTuple

from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.placement import placements
from ultramem_megatron.patches.doors import common_keys

_PREFIX = "decoder.ultramem."
_KINDS = {"values": "values", "values.table": "values", "values.pre_table": "pre_values"}

common_keys.prefixes.add(_PREFIX)


class StoredPlace(NamedTuple):
    """Where a table lies in the checkpoint's: its first row, and rows in all."""

    first: int
    rows: int


def shared_key(name: str) -> str:
    """The checkpoint's name of a table, by that of its module in the memory."""
    return f"{_PREFIX}{_KINDS[name]}"


def stored_place(config: UltraMemConfig, table_number: int) -> StoredPlace | None:
    """Of the table named after this layer; None where memories share nothing."""
    owners = sorted({place.table for place in placements(config)})
    if len(owners) == len(config.spans):
        return None
    number = owners.index(table_number)
    return StoredPlace(number * config.num_values, len(owners) * config.num_values)
