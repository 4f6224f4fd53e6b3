"""Sparse memory finetuning (arXiv 2510.15103): a step moves few rows of each value table.

They are chosen anew in every step, from the reads of all its micro-batches on all ranks
(`memory/row_choice.py`), so that every layout moves the same. All others lose their gradient before
gradients are clipped, and the optimizer leaves rows without one alone.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.background_reads import (
    BackgroundReads,
    TableReads,
    refuse_other_keys,
)
from ultramem_megatron.megatron.optimizer.lazy_adam import make_lazy
from ultramem_megatron.megatron.optimizer.lazy_sgd import make_lazy_sgd
from ultramem_megatron.memory.layer import UltraMemLayer
from ultramem_megatron.memory.row_choice import choose_rows, rarity
from ultramem_megatron.memory.tables.value_table import ValueTable, value_tables


class TrainedRows:
    """Of the tables on this rank; has their memories count the reads of every row."""

    def __init__(
        self,
        layers: Iterable[UltraMemLayer],
        background: BackgroundReads,
        most: int,
        token_group: dist.ProcessGroup,
    ) -> None:
        """most: T, rows of a table that a step may move.

        token_group: ranks that see other tokens with the same layers.
        """
        self.most, self.token_group = most, token_group
        self.layers: dict[int, list[UltraMemLayer]] = {}
        """By table, those that read it."""
        self.rarity: dict[int, Tensor] = {}
        self.unchecked: dict[int, TableReads] = dict(background.tables)
        for layer in layers:
            number, device = layer.table_number, layer.values.weight.device
            self.layers.setdefault(number, []).append(layer)
            layer.statistics.count_rows(device)
            if number not in self.rarity:
                batches = background.tables[number].batches
                self.rarity[number] = rarity(batches, background.batches).to(device)

    def after(self, finalize: Callable[..., None]) -> Callable[..., None]:
        """Megatron's `finalize_model_grads_func`: `finalize`, then the choice of rows."""

        def finalize_then_choose(*args: Any, **kwargs: Any) -> None:
            finalize(*args, **kwargs)
            self.choose()

        return finalize_then_choose

    @torch.no_grad()
    def choose(self) -> None:
        """Clear the gradients of all other rows; a collective, once after each step's backward.

        Raises UltraMemError in the first step, the weights now being there, for background reads
        of another model.
        """
        for number, layers in sorted(self.layers.items()):
            if number in self.unchecked:
                refuse_other_keys(number, self.unchecked.pop(number), layers)
            reads = layers[0].statistics.take_rows()
            for layer in layers[1:]:
                reads += layer.statistics.take_rows()
            dist.all_reduce(reads, group=self.token_group)
            rows = choose_rows(reads, self.rarity[number], self.most)
            for table in value_tables(layers[0]).values():
                _keep(table, rows)


def _keep(table: ValueTable, rows: Tensor) -> None:
    """rows: of the whole table, ascending."""
    held = table.layout.rows()
    own = rows[(rows >= held.start) & (rows < held.stop)] - held.start
    grad: Tensor = table.weight.main_grad  # type: ignore[attr-defined]  # Megatron's tag
    kept = grad[own]
    grad.zero_()
    grad.index_copy_(0, own, kept)


def move_touched_rows(optimizer: torch.optim.Optimizer, tables: Sequence[Tensor]) -> None:
    """Make `optimizer` leave rows (N, V) of `tables` without a gradient alone, and their state.

    Raises UltraMemError for an optimizer that cannot.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        make_lazy(optimizer, tables)
    elif isinstance(optimizer, torch.optim.SGD):
        make_lazy_sgd(optimizer, tables)
    else:
        raise UltraMemError(
            f"--ultramem-train-rows works with PyTorch's AdamW and SGD; the optimizer here is "
            f"{type(optimizer).__name__} (Megatron takes Transformer Engine's or Apex's where they "
            f"are installed). Drop the flag: --ultramem-train-only memory moves all rows."
        )
