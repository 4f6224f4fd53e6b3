"""What is read for the addresses: each kind of values is a file with its place in this list."""

from typing import TYPE_CHECKING

from ultramem_megatron.memory.kinds import Kinds, Listed

if TYPE_CHECKING:  # the list itself needs no torch
    from ultramem_megatron.memory.values.contract import ValuesKind

_HERE = "ultramem_megatron.memory.values"
VALUES: "Kinds[ValuesKind]" = Kinds(
    pooled=Listed(f"{_HERE}.pooled:KIND", "scores times values, summed"),
    prevalued=Listed(
        f"{_HERE}.prevalued:KIND", "scores are multiplied by pre-values (UltraMemV2, PEER)"
    ),
    gated=Listed(f"{_HERE}.gated:KIND", "the sum times a gate of the input (Memory+)"),
)
"""By the word after --ultramem-values."""
