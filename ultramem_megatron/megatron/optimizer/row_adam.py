"""AdamW that visits only rows of value tables that a step reads, to the very result of dense AdamW.

Dense AdamW moves every row at every step, by its momentum and by weight decay, and so reads and
writes the whole table and its moments. Here a row makes the steps it has missed, in the same order
of operations and so with the same bits, when a forward is about to read it (kernels/adam_rows).
Whatever looks at all of a table, as checkpoints do, has all rows make them before.

N table rows, V value dim.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ultramem_megatron.megatron.optimizer.checkpoint_form import expand_for_checkpoints
from ultramem_megatron.megatron.optimizer.compact_rows import CompactRows
from ultramem_megatron.megatron.optimizer.kept_rows import KeptRows
from ultramem_megatron.megatron.optimizer.lazy_rows import update_instead
from ultramem_megatron.megatron.optimizer.table_rounding import roundings
from ultramem_megatron.megatron.table_steps import trained_parts
from ultramem_megatron.memory.tables.value_table import ValueTable, value_tables


def visit_touched_rows(
    optimizer: Any, layers: Iterable[Any], moments: str = "float32", seed: int | None = None
) -> None:
    """From now on Megatron's `optimizer` visits only rows of these memories' tables that are read.

    layers: TransformerMemory. moments: how they are kept, of
    `memory.config.UltraMemConfig.table_moments`. seed: of the rounding of tables, in bfloat16, that
    are to have no float32 copy; None: they have one. Raises UltraMemError where that is impossible.
    """
    layers = list(layers)
    rounding = roundings(layers, seed)
    keep = KeptRows if moments == "float32" else functools.partial(CompactRows, moments)
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
            id(part): keep(
                single.optimizer, *tables[id(weight)], part, rounding[tables[id(weight)][0]]
            )
            for weight, part in trained_parts(single, weights)
        }
        if kept:
            _take_over(single.optimizer, kept)
            if seed is not None or moments != "float32":
                expand_for_checkpoints(single, [*kept.values()])


def _take_over(optimizer: torch.optim.Optimizer, kept: Mapping[int, KeptRows]) -> None:
    def update(part: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        kept[id(part)].step(group, state)

    def catch_up(*_: Any) -> None:
        for rows in kept.values():
            rows.catch_up()

    update_instead(optimizer, [rows.part for rows in kept.values()], update)
    optimizer.register_state_dict_pre_hook(catch_up)
    optimizer.register_load_state_dict_pre_hook(catch_up)
