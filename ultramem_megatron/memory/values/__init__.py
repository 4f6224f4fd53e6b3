"""What is read for the addresses: each kind of values is a file with its place in this list."""

from typing import TYPE_CHECKING

from ultramem_megatron.memory.kinds import Kinds, Listed

if TYPE_CHECKING:  # the list itself needs no torch
    from ultramem_megatron.memory.values.contract import ValuesKind

VALUES: "Kinds[ValuesKind]" = Kinds(
    pooled=Listed("ultramem_megatron.memory.values.pooled:KIND", "scores times values, summed")
)
"""By the word after --ultramem-values."""
