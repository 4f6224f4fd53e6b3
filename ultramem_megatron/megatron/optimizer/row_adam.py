"""AdamW that visits only rows of value tables that a step reads, to the very result of dense AdamW.

Dense AdamW moves every row at every step, by its momentum and by weight decay, and so reads and
writes the whole table and its moments. Here a row makes the steps it has missed, in the same order
of operations and so with the same bits, when a forward is about to read it (kernels/adam_rows).
Whatever looks at all of a table, as checkpoints do, has all rows make them before.

N table rows, V value dim.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.kernels.adam_rows import AdamStep, Moments
from ultramem_megatron.megatron.optimizer.lazy_rows import update_instead
from ultramem_megatron.megatron.optimizer.visited_rows import (
    VisitedRows,
    begin_step,
    refuse_other_optimizers,
)
from ultramem_megatron.megatron.table_steps import trained_parts
from ultramem_megatron.memory.tables.value_table import ValueTable, value_tables

_FLAG = "--ultramem-row-adam"


def visit_touched_rows(optimizer: Any, layers: Iterable[Any]) -> None:
    """From now on Megatron's `optimizer` visits only rows of these memories' tables that are read.

    layers: TransformerMemory. Raises UltraMemError where that is impossible.
    """
    tables: dict[int, tuple[ValueTable, Any]] = {}
    for layer in layers:
        group = layer.token_group if layer.groups is None else layer.groups.replicas
        for table in value_tables(layer).values():
            tables[id(table.weight)] = table, group
    weights = {key: table.weight for key, (table, _) in tables.items()}
    for single in getattr(optimizer, "chained_optimizers", [optimizer]):
        if single.optimizer is None:
            continue
        kept = {
            id(part): _KeptRows(single.optimizer, *tables[id(weight)], part)
            for weight, part in trained_parts(single, weights)
        }
        if kept:
            _take_over(single.optimizer, kept)


def _take_over(optimizer: torch.optim.Optimizer, kept: Mapping[int, "_KeptRows"]) -> None:
    def update(part: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        kept[id(part)].step(group, state)

    def catch_up(*_: Any) -> None:
        for rows in kept.values():
            rows.catch_up()

    update_instead(optimizer, [rows.part for rows in kept.values()], update)
    optimizer.register_state_dict_pre_hook(catch_up)
    optimizer.register_load_state_dict_pre_hook(catch_up)


class _KeptRows(VisitedRows):
    """Of one table, or of this rank's part."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, table: ValueTable, replicas: Any, part: Tensor
    ) -> None:
        """replicas: ranks that add up their gradients. part: of the table, what AdamW trains."""
        refuse_other_optimizers(optimizer, _FLAG)
        self.replicas, self.part = replicas, part
        if part.numel() != table.weight.numel() or (part.dim() == 1 and replicas.size() > 1):
            raise UltraMemError(
                f"{_FLAG} with --use-distributed-optimizer needs whole tables on every rank, but "
                f"here {replicas.size()} ranks hold the same part of a table, and it is cut "
                f"between them. Set --ultramem-parallel-size to all ranks of a pipeline stage, or "
                f"drop one of the two."
            )
        self._state = optimizer.state
        super().__init__(table)

    def step(self, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        """The optimizer's, with the gradient of `part`, which is reduced over the replicas."""
        number = begin_step(state, self.part)
        if self.replicas.size() > 1:  # a row has a gradient that any of them has read
            dist.all_reduce(self._rows.touched, dist.ReduceOp.MAX, group=self.replicas)
        grad = self.part.grad
        assert grad is not None
        self._rows.step(self._moments(), grad.view(self.weight.shape), AdamStep.of(group, number))

    def _moments(self) -> Moments:
        state, shape = self._state[self.part], self.weight.shape
        trained = (self.part, state["exp_avg"], state["exp_avg_sq"])
        copy = None if self.weight.dtype == self.part.dtype else self.weight.detach()
        return Moments(*(tensor.detach().view(shape) for tensor in trained), copy)
