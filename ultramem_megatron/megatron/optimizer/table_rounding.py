"""How tables without a float32 copy are rounded (kernels/adam_rows/rounding.py)."""

import hashlib
from collections.abc import Iterable
from typing import Any

from ultramem_megatron.kernels.adam_rows.rounding import Rounding
from ultramem_megatron.memory.tables.value_table import ValueTable, value_tables


def roundings(layers: Iterable[Any], seed: int | None) -> dict[ValueTable, Rounding | None]:
    """Of each table of these TransformerMemory, by the run's seed; none without a seed."""
    return {
        table: None if seed is None else _rounding(table, f"{seed}/{layer.table_number}/{name}")
        for layer in layers
        for name, table in value_tables(layer).items()
    }


def _rounding(table: ValueTable, key: str) -> Rounding:
    number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
    layout = table.layout
    return Rounding(number, layout.rows().start, layout.columns().start)
