"""The whole table on every rank: no exchange. What the other partitions must equal."""

from dataclasses import dataclass

from torch import Tensor

from ultramem_megatron.communication.pausing import Steps
from ultramem_megatron.kernels.lookup_reduce import lookup_reduce
from ultramem_megatron.memory.retrieval.addresses import split_address


@dataclass(frozen=True)
class ReplicatedReader:
    """Reads this rank's own, whole table."""

    num_values: int
    num_groups: int
    pauses = 0

    def read(self, part: Tensor, addresses: Tensor, scores: Tensor) -> Steps:
        """See TableReader.read."""
        yield from ()
        rows, groups = split_address(addresses, self.num_values)
        return lookup_reduce(part, rows, groups, scores, self.num_groups)
