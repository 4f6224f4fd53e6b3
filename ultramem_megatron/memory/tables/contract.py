"""What every partition of a value table offers: read values for this rank's tokens.

T tokens of this rank, P picks per token (H*m), C cores, E expansion groups, V value dim.
"""

from typing import Protocol

from torch import Tensor

from ultramem_megatron.communication.pausing import Steps


class TableReader(Protocol):
    """Reads a table that may be spread over ranks. All ranks take part in each call."""

    @property
    def pauses(self) -> int:
        """How often a read pauses for the other ranks."""
        ...

    def read(self, part: Tensor, addresses: Tensor, scores: Tensor) -> Steps:
        """Pooled values of this rank's tokens, differentiable in `part` and `scores`; in steps.

        part: this rank's part of the table, `TableLayout.shape`. addresses: (T, P) int64, shuffled
        virtual addresses, group * N + row. scores: (T, P, C). Returns (T, E, V) in the table's
        dtype, the same for every partition up to the order of summation.
        """
        ...
