"""What AdamW on rows knows of one table on the device.

N table rows, V value dim.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.kernels.adam_rows import AdamStep, AnyMoments, Moments
from ultramem_megatron.kernels.adam_rows.rounding import Rounding
from ultramem_megatron.megatron.optimizer.visited_rows import (
    VisitedRows,
    begin_step,
    refuse_other_optimizers,
)
from ultramem_megatron.memory.tables.value_table import ValueTable

_FLAG = "--ultramem-row-adam"


class KeptRows(VisitedRows):
    """Of one table, or of this rank's part."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        table: ValueTable,
        replicas: Any,
        part: Tensor,
        rounding: Rounding | None = None,
    ) -> None:
        """replicas: ranks that add up their gradients. part: of the table, what AdamW trains.

        rounding: of a bfloat16 table that is to have no copy in float32.
        """
        refuse_other_optimizers(optimizer, _FLAG)
        self.replicas, self.part = replicas, part
        if part.numel() != table.weight.numel() or (part.dim() == 1 and replicas.size() > 1):
            raise UltraMemError(
                f"{_FLAG} with --use-distributed-optimizer needs whole tables on every rank, but "
                f"here {replicas.size()} ranks hold the same part of a table, and it is cut "
                f"between them. Set --ultramem-parallel-size to all ranks of a pipeline stage, or "
                f"drop one of the two."
            )
        self._optimizer, self.rounding = optimizer, rounding
        super().__init__(table)
        if rounding is not None:
            part.grad_dtype = torch.float32
            self._without_copy()

    def step(self, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        """The optimizer's, with the gradient of `part`, which is reduced over the replicas."""
        number = self._begin_step(state)
        if self.replicas.size() > 1:  # a row has a gradient that any of them has read
            dist.all_reduce(self._rows.touched, dist.ReduceOp.MAX, group=self.replicas)
        grad = self.part.grad
        assert grad is not None
        self._rows.step(self._moments(), grad.view(self.weight.shape), AdamStep.of(group, number))

    def expand(self) -> None:
        """Put what checkpoints hold, up to date and in float32, where AdamW has it."""
        self.catch_up()
        if self.rounding is not None:
            self.part.data = self.weight.data.float().view(self.part.shape)

    def drop(self, loaded: bool) -> None:
        """After `expand`: take it from there; loaded: it is other now, as the weights are."""
        if self.rounding is not None:
            self._without_copy()

    def _without_copy(self) -> None:
        """Let what AdamW trains be the table: what Megatron copies between the two is the same."""
        self.part.data = self.weight.data.view(self.part.shape)

    def _begin_step(self, state: dict[str, Any]) -> int:
        return begin_step(state, self.part)

    def _moments(self) -> AnyMoments:
        state, shape = self._optimizer.state[self.part], self.weight.shape
        trained = (self.part, state["exp_avg"], state["exp_avg_sq"])
        # Without their versions: another micro-batch that waits for its backward read other rows.
        copy = None if self.weight.dtype == self.part.dtype else self.weight.data
        return Moments(*(tensor.data.view(shape) for tensor in trained), copy, self.rounding)
