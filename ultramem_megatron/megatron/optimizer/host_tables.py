"""AdamW on value tables in host memory: weights, float32 copy, moments, all of it there.

In Megatron's optimizer stands one number for each table (HostRows): it brings the table's
group, with its learning rate and weight decay, and a gradient, the norm of the rows' own. Where the
optimizer steps, AdamW visits the rows that were read, as --ultramem-row-adam has it, and the number
stays. Checkpoints have the tables in its place, in the form that tables on the device have.

N table rows, V value dim.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from ultramem_megatron.megatron.optimizer.host_adam import CompactHostAdam, HostAdam
from ultramem_megatron.megatron.optimizer.host_distributed import DistributedTrainer
from ultramem_megatron.megatron.optimizer.table_rounding import roundings
from ultramem_megatron.megatron.optimizer.visited_rows import refuse_other_optimizers
from ultramem_megatron.memory.tables.value_table import value_tables

_LISTS = ("float16_groups", "fp32_from_float16_groups", "fp32_from_fp32_groups")
_OF_CHECKPOINTS = ("sharded_state_dict", "state_dict", "load_state_dict", "reload_model_params")
_LOADS = "load_state_dict"


def train_on_host(
    optimizer: Any, layers: Iterable[Any], moments: str = "float32", seed: int | None = None
) -> None:
    """From now on Megatron's `optimizer` trains these memories' tables where they are.

    layers: TransformerMemory. moments: how they are kept, of
    `memory.config.UltraMemConfig.table_moments`. seed: of the rounding of tables, in bfloat16, that
    are to have no float32 copy; None: they have one. Raises UltraMemError for an optimizer that is
    not AdamW.
    """
    layers = list(layers)
    rounding = roundings(layers, seed)
    keep = HostAdam if moments == "float32" else functools.partial(CompactHostAdam, moments)
    tables = {
        id(table.stand_in): table
        for layer in layers
        for table in value_tables(layer).values()
        if table.rows is not None
    }
    for single in getattr(optimizer, "chained_optimizers", [optimizer]) if tables else ():
        if single.optimizer is None:
            continue
        distributed = isinstance(single, DistributedOptimizer)
        held = _in_buffers(single) if distributed else _in_groups(single)
        trained = {
            id(p): keep(tables[id(p)], rounding[tables[id(p)]]) for p in held if id(p) in tables
        }
        if trained:
            refuse_other_optimizers(single.optimizer, "--ultramem-table-memory host")
            (DistributedTrainer if distributed else _Trainer)(single, trained).take_over()


def _in_groups(single: Any) -> list[Tensor]:
    return [p for group in single.optimizer.param_groups for p in group["params"]]


def _in_buffers(single: Any) -> list[Tensor]:
    """Of a distributed optimizer, whichever rank has them in its shard."""
    return [p for buffer in single.buffers for p in buffer.param_index_map]


class _Trainer:
    """One of Megatron's optimizers, and the tables that stand-ins among its parameters are for."""

    def __init__(self, single: Any, tables: Mapping[int, HostAdam]) -> None:
        """tables: by the stand-in's id."""
        self.single, self.tables, self._in_place = single, tables, False

    def take_over(self) -> None:
        """Its steps, and what checkpoints are written from and read into."""
        self.single.optimizer.register_step_pre_hook(self._step)
        for name in _OF_CHECKPOINTS:
            setattr(
                self.single, name, self._with_tables(getattr(self.single, name), name == _LOADS)
            )

    @torch.no_grad()
    def _step(self, *_: Any) -> None:
        for group in self.single.optimizer.param_groups:
            for parameter in group["params"]:
                table = self.tables.get(id(parameter))
                if table is not None and parameter.grad is not None:
                    table.step(float(parameter.grad), group)
                    parameter.grad = None  # which the optimizer passes over

    def _with_tables(self, method: Callable[..., Any], loads: bool) -> Callable[..., Any]:
        @functools.wraps(method)
        def with_tables(*args: Any, **kwargs: Any) -> Any:
            if self._in_place:
                return method(*args, **kwargs)
            with self._tables_in_place(loads):
                return method(*args, **kwargs)

        return with_tables

    @contextmanager
    def _tables_in_place(self, loads: bool) -> Iterator[None]:
        """Within it, up to date, where their stand-ins are, with their state."""
        optimizer, places = self.single.optimizer, list(self._places())
        for _, _, table in places:
            table.expand()
        lists = self._lists_with_tables()
        before = {name: getattr(self.single, name) for name in lists}
        vars(self.single).update(lists)
        for params, place, table in places:
            params[place] = table.master
            optimizer.state.pop(table.home.stand_in, None)
            if table.state:
                optimizer.state[table.master] = table.state
        self._in_place = True
        try:
            yield
        finally:
            self._in_place = False
            for params, place, table in places:
                params[place] = table.home.stand_in
                table.state = dict(optimizer.state.pop(table.master, {}))
                table.drop(loads)
            vars(self.single).update(before)

    def _places(self) -> Iterator[tuple[list[Tensor], int, HostAdam]]:
        for group in self.single.optimizer.param_groups:
            for place, parameter in enumerate(group["params"]):
                if id(parameter) in self.tables:
                    yield group["params"], place, self.tables[id(parameter)]

    def _lists_with_tables(self) -> dict[str, list[list[Tensor]]]:
        """Of half-precision weights, their copies, and other parameters; empty without any."""
        if not hasattr(self.single, "float16_groups"):
            return {}
        before = [getattr(self.single, name) for name in _LISTS]
        weights = dict(zip(map(id, chain(*before[1])), chain(*before[0]), strict=True))
        found: dict[str, list[list[Tensor]]] = {name: [] for name in _LISTS}
        for group in self.single.optimizer.param_groups:
            half: list[Tensor] = []
            copies: list[Tensor] = []
            precise: list[Tensor] = []
            for parameter in group["params"]:
                table = self.tables.get(id(parameter))
                if table is not None:
                    half.append(table.weight)
                    copies.append(table.master)
                elif id(parameter) in weights:
                    half.append(weights[id(parameter)])
                    copies.append(parameter)
                else:
                    precise.append(parameter)
            for name, tensors in zip(_LISTS, (half, copies, precise), strict=True):
                found[name].append(tensors)
        return found
