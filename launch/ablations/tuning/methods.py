"""Ways to teach a trained model: all weights, low-rank changes, rows of its value tables."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn
from torch.nn.utils import parametrize

from launch.ablations.tuning.low_rank import LowRank
from ultramem_megatron.megatron.background_reads import BackgroundReads
from ultramem_megatron.megatron.optimizer.train_rows import TrainedRows, move_touched_rows
from ultramem_megatron.megatron.train_only import train_only_values
from ultramem_megatron.memory.layer import memory_layers
from ultramem_megatron.memory.tables.value_table import value_tables

RANK = 8
ROWS = 500  # of the 25,600 of a table
_LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class Tuner:
    """The optimizer of what is trained, and what comes between backward and its step."""

    optimizer: torch.optim.Optimizer
    before_step: Callable[[], None]


Make = Callable[[Any, BackgroundReads, float], Tuner]


@dataclass(frozen=True)
class Method:
    """make: freezes the rest of a model and gives its Tuner, at a learning rate."""

    name: str
    rates: tuple[float, ...]
    make: Make


def _all_weights(model: Any, _background: BackgroundReads, rate: float) -> Tuner:
    layers = list(memory_layers(model))

    def end_batch() -> None:
        for layer in layers:
            layer.end_batch()

    return Tuner(torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0), end_batch)


def _low_rank(model: Any, _background: BackgroundReads, rate: float) -> Tuner:
    train_only_values([model])  # which freezes the running means, too
    for table in _tables(model):
        table.requires_grad_(False)
    trained: list[nn.Parameter] = []
    for name, module in list(model.named_modules()):
        if name.endswith(_LINEAR):
            change = LowRank(module.weight, RANK)
            parametrize.register_parametrization(module, "weight", change)
            trained += change.parameters()
    return Tuner(torch.optim.AdamW(trained, lr=rate, weight_decay=0.0), lambda: None)


def _rows(kind: type[torch.optim.Optimizer], most: int | None) -> Make:
    """most: T; None: all rows that a batch reads."""

    def make(model: Any, background: BackgroundReads, rate: float) -> Tuner:
        train_only_values([model])
        tables = _tables(model)
        optimizer = kind(tables, lr=rate, weight_decay=0.0)  # type: ignore[call-arg]  # of both kinds
        move_touched_rows(optimizer, tables)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        rows = TrainedRows(memory_layers(model), background, most or len(tables[0]), group)

        def choose() -> None:
            for table in tables:
                table.main_grad = table.grad  # type: ignore[attr-defined]  # where Megatron has it
            rows.choose()
            for table in tables:
                del table.main_grad  # type: ignore[attr-defined]  # set above

        return Tuner(optimizer, choose)

    return make


METHODS = (
    Method("all weights", (3e-4, 1e-3), _all_weights),
    Method(f"low rank, {RANK}", (3e-3, 1e-2), _low_rank),
    Method("values, all read", (3e-3, 1e-2), _rows(torch.optim.AdamW, None)),
    Method(f"{ROWS} rows, Adam", (3e-2, 1e-1), _rows(torch.optim.AdamW, ROWS)),
    Method(f"{ROWS} rows, SGD", (100.0, 300.0), _rows(torch.optim.SGD, ROWS)),
)


def _tables(model: Any) -> list[nn.Parameter]:
    return [
        table.weight for layer in memory_layers(model) for table in value_tables(layer).values()
    ]


@contextmanager
def as_it_was(model: Any) -> Iterator[None]:
    """What is done to the model within leaves no trace after it."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    try:
        yield
    finally:
        for module in model.modules():
            if parametrize.is_parametrized(module):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
                parameter.grad = None
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        model.requires_grad_(True)
        for layer in memory_layers(model):
            layer.statistics.rows = None
            if layer.query.common is not None:
                layer.query.common.frozen = False
