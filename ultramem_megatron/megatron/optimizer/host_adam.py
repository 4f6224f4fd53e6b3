"""AdamW on one value table in host memory: weights, float32 copy, moments, all of it there.

N table rows, V value dim.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ultramem_megatron.kernels.adam_rows import AdamStep, AnyMoments, Moments
from ultramem_megatron.kernels.adam_rows.compact import CompactMoments, compact
from ultramem_megatron.kernels.adam_rows.rounding import Rounding
from ultramem_megatron.megatron.optimizer.compact_state import expand_into, rows_over, take_from
from ultramem_megatron.megatron.optimizer.visited_rows import VisitedRows, begin_step, count_step
from ultramem_megatron.memory.tables.host_rows import HostRows
from ultramem_megatron.memory.tables.value_table import ValueTable


class HostAdam(VisitedRows):
    """Of one table, with its optimizer state."""

    def __init__(self, table: ValueTable, rounding: Rounding | None = None) -> None:
        """rounding: of a bfloat16 table that is to have no copy in float32."""
        assert table.rows is not None
        super().__init__(table)
        self.home: HostRows = table.rows
        self.rounding = rounding
        whole = self.weight.dtype == torch.float32 or rounding is not None
        self.master = self.weight if whole else self.weight.detach().float()
        self.state: dict[str, Tensor] = {}

    def step(self, norm: float, group: Mapping[str, Any]) -> None:
        """norm: the stand-in's gradient, after what Megatron has done to it."""
        number = self._begin_step()
        rows, gradient = self.home.complete(), self.home.gradient
        assert gradient is not None, "a step without a backward"
        self._rows.touched.index_fill_(0, rows, 1)  # also those that other ranks have read
        if norm != self.home.norm:
            gradient.index_copy_(0, rows, gradient[rows] * (norm / self.home.norm))
        self._rows.step(self._moments(), gradient, AdamStep.of(group, number))

    def expand(self) -> None:
        """Before checkpoints: weights up to date and in float32 in `master`, moments in `state`."""
        self.catch_up()
        if self.rounding is not None:
            self.master = self.weight.detach().float()

    def drop(self, loaded: bool) -> None:
        """After `expand`; loaded: what it put there is other now, as the weights are."""
        if self.rounding is not None:
            self.master = self.weight

    def _begin_step(self) -> int:
        return begin_step(self.state, self.master)

    def _moments(self) -> AnyMoments:
        tensors = (self.master, self.state["exp_avg"], self.state["exp_avg_sq"])
        copy = None if self.master is self.weight else self.weight.data
        return Moments(*(tensor.data for tensor in tensors), copy, self.rounding)


class CompactHostAdam(HostAdam):
    """The same with smaller moments, which `state` has while checkpoints are written or read."""

    def __init__(self, kind: str, table: ValueTable, rounding: Rounding | None = None) -> None:
        """kind: of kernels.adam_rows.compact.KINDS; else as HostAdam."""
        super().__init__(table, rounding)
        copy = None if self.master is self.weight else self.weight.data
        self._compact = compact(kind, self.master.data, copy, rows_over(table), rounding)

    def expand(self) -> None:
        """See HostAdam."""
        super().expand()
        expand_into(self.state, self._compact, self.master)

    def drop(self, loaded: bool) -> None:
        """See HostAdam."""
        super().drop(loaded)
        take_from(self.state, self._compact, loaded)

    def _begin_step(self) -> int:
        return count_step(self.state)

    def _moments(self) -> CompactMoments:
        return self._compact
