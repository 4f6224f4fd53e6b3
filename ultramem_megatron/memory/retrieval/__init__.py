"""From queries to addresses and scores: each retrieval is a file with its place in this list."""

from ultramem_megatron.memory.retrieval import product_key, tdqkr
from ultramem_megatron.memory.retrieval.contract import RetrievalKind

RETRIEVALS: dict[str, RetrievalKind] = {kind.name: kind for kind in (tdqkr.KIND, product_key.KIND)}
"""By the word after --ultramem-retrieval."""
