"""What is read for the addresses: each kind of values is a file with its place in this list."""

from ultramem_megatron.memory.values import pooled
from ultramem_megatron.memory.values.contract import ValuesKind

VALUES: dict[str, ValuesKind] = {kind.name: kind for kind in (pooled.KIND,)}
"""By the word after --ultramem-values."""
