"""Smaller moments in checkpoints, which have AdamW's own, and of tables cut by columns.

Megatron's optimizer state does not hold them. While a checkpoint is written or read, moments are in
float32 where AdamW has them. So a run may change how they are kept at any checkpoint.

N table rows, u of them, V value dim.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ultramem_megatron.kernels.adam_rows.compact import CompactMoments, RowsOver, expand, pack
from ultramem_megatron.memory.tables.value_table import ValueTable

_NAMES = ("exp_avg", "exp_avg_sq")


def expand_into(state: dict[str, Any], moments: CompactMoments, trained: Tensor) -> None:
    """Put moments that are up to date into AdamW's `state` of `trained`, if it has made a step."""
    if state:
        whole = (moment.view_as(trained) for moment in expand(moments))
        state.update(zip(_NAMES, whole, strict=True))


@torch.no_grad()
def take_from(state: dict[str, Any], moments: CompactMoments, loaded: bool) -> None:
    """Take AdamW's out of `state`; loaded: `moments` become those, a collective (RowsOver)."""
    mean, square = (state.pop(name, None) for name in _NAMES)
    if loaded and mean is not None and square is not None:
        shape = moments.values.shape
        pack(moments, mean.view(shape), square.view(shape))


def rows_over(table: ValueTable) -> RowsOver:
    """What a row's numbers are added up over, and their largest found: ranks with its columns.

    They read the same rows (dimension_wise.py), so they come to a step with as many.
    """
    group = table.column_ranks
    if group is None:
        return RowsOver()

    def reduced(operation: Any, numbers: Tensor) -> Tensor:
        there = numbers.to(table.trained.device, copy=True)
        dist.all_reduce(there, operation, group=group)
        return there.to(numbers.device)

    operations = (dist.ReduceOp.SUM, dist.ReduceOp.MAX)
    total, largest = (functools.partial(reduced, operation) for operation in operations)
    return RowsOver(table.layout.column_parts, total, largest)
