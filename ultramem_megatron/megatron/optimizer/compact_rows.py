"""AdamW on rows with smaller moments, of tables on the device; see compact_state.py.

N table rows, V value dim.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ultramem_megatron.kernels.adam_rows.compact import CompactMoments, compact
from ultramem_megatron.megatron.optimizer.compact_state import expand_into, rows_over, take_from
from ultramem_megatron.megatron.optimizer.kept_rows import KeptRows
from ultramem_megatron.megatron.optimizer.visited_rows import count_step
from ultramem_megatron.memory.tables.value_table import ValueTable

_SAVES, _LOADS = ("sharded_state_dict", "state_dict"), "load_state_dict"


class CompactRows(KeptRows):
    """Of one table, or of this rank's rows."""

    def __init__(
        self,
        kind: str,
        optimizer: torch.optim.Optimizer,
        table: ValueTable,
        replicas: Any,
        part: Tensor,
    ) -> None:
        """kind: of kernels.adam_rows.compact.KINDS; else as KeptRows."""
        super().__init__(optimizer, table, replicas, part)
        # Without their versions: another micro-batch that waits for its backward read other rows.
        values = part.data.view(self.weight.shape)
        copy = None if self.weight.dtype == part.dtype else self.weight.data
        self._compact = compact(kind, values, copy, rows_over(table))

    def _begin_step(self, state: dict[str, Any]) -> int:
        return count_step(state)

    def _moments(self) -> CompactMoments:
        return self._compact

    def expand(self) -> None:
        """Put the moments, up to date, where AdamW has them."""
        self.catch_up()
        expand_into(self._optimizer.state.get(self.part, {}), self._compact, self.part)

    def drop(self, loaded: bool) -> None:
        """Take them from there; loaded: they are others now."""
        take_from(self._optimizer.state.get(self.part, {}), self._compact, loaded)


def expand_for_checkpoints(single: Any, tables: Sequence[CompactRows]) -> None:
    """Let Megatron's optimizer `single` write and read checkpoints with AdamW's own moments."""
    nested = False

    def wrapped(method: Callable[..., Any], loads: bool) -> Callable[..., Any]:
        @functools.wraps(method)
        def with_moments(*args: Any, **kwargs: Any) -> Any:
            nonlocal nested
            if nested:
                return method(*args, **kwargs)
            nested = True
            for rows in tables:
                rows.expand()
            try:
                return method(*args, **kwargs)
            finally:
                nested = False
                for rows in tables:
                    rows.drop(loads)

        return with_moments

    for name in (*_SAVES, _LOADS):
        setattr(single, name, wrapped(getattr(single, name), name == _LOADS))
