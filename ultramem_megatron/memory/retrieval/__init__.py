"""From queries to addresses and scores: each retrieval is a file with its place in this list."""

from typing import TYPE_CHECKING

from ultramem_megatron.memory.kinds import Kinds, Listed

if TYPE_CHECKING:  # the list itself needs no torch
    from ultramem_megatron.memory.retrieval.contract import RetrievalKind

_HERE = "ultramem_megatron.memory.retrieval"
RETRIEVALS: "Kinds[RetrievalKind]" = Kinds(
    tdqkr=Listed(f"{_HERE}.tdqkr:KIND", "Tucker-decomposed query-key retrieval"),
    pkm=Listed(f"{_HERE}.product_key:KIND", "product keys, the baseline"),
)
"""By the word after --ultramem-retrieval."""
