"""Value tables in vLLM: each of its tensor-parallel ranks holds some of their rows.

A rank leaves out what others hold, and the sums of all are added. Pre-values lie with their values:
what they are multiplied with is needed nowhere else.

N rows of a table, T tokens, P picks of a token, C cores, E expansion, V value dim, W width of a
pre-value.
"""

import importlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .mapped_ultramem import leave_on_disk
from .memory_ultramem import UltraMemMemory
from .quantized_ultramem import QuantizedTable
from .values_ultramem import UltraMemTables, ValueTable

Table = ValueTable | QuantizedTable


def serve_tables(model: nn.Module, table_memory: str) -> None:
    """Cut the tables of a model that vLLM makes; its loader then calls their `load_weights`."""
    engine = importlib.import_module("vllm.distributed")  # not needed by folders elsewhere
    for module in list(model.modules()):
        if not isinstance(module, (UltraMemMemory, UltraMemTables)):
            continue
        tables: Any = module
        if getattr(tables, "values", None) is not None:
            tables.values = ServedValues(tables.values, engine, table_memory)
        if getattr(tables, "pre_values", None) is not None:
            tables.pre_values = ServedPreValues(tables.pre_values, engine, table_memory)


class ServedTable(nn.Module):
    """This rank's rows of a table."""

    def __init__(self, table: Table, engine: Any, table_memory: str) -> None:
        super().__init__()
        self.on_disk = table_memory == "disk"
        self.add_up = engine.tensor_model_parallel_all_reduce
        self.number = len(next(iter(table.state_dict().values())))
        rank, ranks = (
            engine.get_tensor_model_parallel_rank(),
            engine.get_tensor_model_parallel_world_size(),
        )
        self.rows = range(self.number * rank // ranks, self.number * (rank + 1) // ranks)
        for name, whole in table.state_dict(keep_vars=True).items():
            part: Tensor = whole.new_empty(len(self.rows), *whole.shape[1:])
            if isinstance(whole, nn.Parameter):
                part = nn.Parameter(part, requires_grad=False)
            setattr(table, name, part)
        if self.on_disk and isinstance(table, ValueTable):
            # With any loader of its own, vLLM makes no room for a parameter.
            table.weight.weight_loader = self.load_weights  # type: ignore[attr-defined]  # a tag
        self.table = table

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        """Take this rank's rows of whole tables, by name; yields the names as they are here."""
        for name, whole in weights:
            part = whole[self.rows.start : self.rows.stop]
            if self.on_disk:
                leave_on_disk(name, part)
                held = getattr(self.table, name)
                parameter = isinstance(held, nn.Parameter)
                setattr(self.table, name, nn.Parameter(part, False) if parameter else part)
            else:
                getattr(self.table, name).data.copy_(part)
            yield f"table.{name}"

    def local(self, addresses: Tensor) -> tuple[Tensor, Tensor]:
        """Addresses (T, P) in this rank's rows, and whether each is there; if not, any row's."""
        rows, groups = addresses % self.number, addresses // self.number
        here = (rows >= self.rows.start) & (rows < self.rows.stop)
        rows = torch.where(here, rows - self.rows.start, 0)
        return groups * len(self.rows) + rows, here

    def bring(self, addresses: Tensor) -> None:
        """Have those of the rows fetched that are here, where the table is on disk."""
        places, here = self.local(addresses)
        self.table.bring(places[here])


class ServedValues(ServedTable):
    """Values, pooled by their scores."""

    def forward(self, addresses: Tensor, scores: Tensor) -> Tensor:
        """(T, E*V) for virtual addresses (T, P) and scores (T, P, C)."""
        places, here = self.local(addresses)
        pooled: Tensor = self.add_up(self.table(places, scores * here.unsqueeze(2)))
        return pooled


class ServedPreValues(ServedTable):
    """Pre-values: products with those that are here, others without meaning."""

    def forward(self, addresses: Tensor, x: Tensor) -> Tensor:
        """(T, P) for virtual addresses (T, P) and inputs (T, W)."""
        products: Tensor = self.table(self.local(addresses)[0], x)
        return products
