"""What a memory layer's forward is counted and averaged by."""

from ultramem_megatron.kernels.read_statistics.choice import add_statistics
from ultramem_megatron.kernels.read_statistics.reference import (
    COMPARED,
    Counting,
    add_reads,
    add_statistics_reference,
)

__all__ = ["COMPARED", "Counting", "add_reads", "add_statistics", "add_statistics_reference"]
