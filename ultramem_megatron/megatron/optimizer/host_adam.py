"""AdamW on one value table in host memory: weights, float32 copy, moments, all of it there.

N table rows, V value dim.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ultramem_megatron.kernels.adam_rows import AdamStep, Moments
from ultramem_megatron.megatron.optimizer.visited_rows import VisitedRows, begin_step
from ultramem_megatron.memory.tables.host_rows import HostRows
from ultramem_megatron.memory.tables.value_table import ValueTable


class HostAdam(VisitedRows):
    """Of one table, with its optimizer state."""

    def __init__(self, table: ValueTable) -> None:
        assert table.rows is not None
        super().__init__(table)
        self.home: HostRows = table.rows
        precise = self.weight.dtype == torch.float32
        self.master = self.weight if precise else self.weight.detach().float()
        self.state: dict[str, Tensor] = {}

    def step(self, norm: float, group: Mapping[str, Any]) -> None:
        """norm: the stand-in's gradient, after what Megatron has done to it."""
        number = begin_step(self.state, self.master)
        rows, gradient = self.home.complete(), self.home.gradient
        assert gradient is not None, "a step without a backward"
        self._rows.touched.index_fill_(0, rows, 1)  # also those that other ranks have read
        if norm != self.home.norm:
            gradient.index_copy_(0, rows, gradient[rows] * (norm / self.home.norm))
        self._rows.step(self._moments(), gradient, AdamStep.of(group, number))

    def _moments(self) -> Moments:
        tensors = (self.master, self.state["exp_avg"], self.state["exp_avg_sq"])
        copy = None if self.master is self.weight else self.weight.data
        return Moments(*(tensor.data for tensor in tensors), copy)
