"""AdamW on rows with smaller moments, of tables on the device; see compact_state.py.

N table rows, V value dim.
"""

from typing import Any

import torch
from torch import Tensor

from ultramem_megatron.kernels.adam_rows.compact import CompactMoments, compact
from ultramem_megatron.kernels.adam_rows.rounding import Rounding
from ultramem_megatron.megatron.optimizer.compact_state import expand_into, rows_over, take_from
from ultramem_megatron.megatron.optimizer.kept_rows import KeptRows
from ultramem_megatron.megatron.optimizer.visited_rows import count_step
from ultramem_megatron.memory.tables.value_table import ValueTable


class CompactRows(KeptRows):
    """Of one table, or of this rank's rows."""

    def __init__(
        self,
        kind: str,
        optimizer: torch.optim.Optimizer,
        table: ValueTable,
        replicas: Any,
        part: Tensor,
        rounding: Rounding | None = None,
    ) -> None:
        """kind: of kernels.adam_rows.compact.KINDS; else as KeptRows."""
        super().__init__(optimizer, table, replicas, part, rounding)
        # Without their versions: another micro-batch that waits for its backward read other rows.
        values = part.data.view(self.weight.shape)
        copy = None if self.weight.dtype == part.dtype else self.weight.data
        self._compact = compact(kind, values, copy, rows_over(table), rounding)

    def _begin_step(self, state: dict[str, Any]) -> int:
        return count_step(state)

    def _moments(self) -> CompactMoments:
        return self._compact

    def expand(self) -> None:
        """Also moments."""
        super().expand()
        expand_into(self._optimizer.state.get(self.part, {}), self._compact, self.part)

    def drop(self, loaded: bool) -> None:
        """Also moments."""
        super().drop(loaded)
        take_from(self._optimizer.state.get(self.part, {}), self._compact, loaded)
