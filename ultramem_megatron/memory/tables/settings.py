"""How the value tables of a run are cut: group size and partition."""

import os
from dataclasses import dataclass
from typing import Literal

from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.tables.layout import TableLayout
from ultramem_megatron.memory.tables.traffic import Exchange

Partition = Literal["number", "dimension"]

PARTITIONS = ("auto", "number", "dimension")


@dataclass(frozen=True)
class TableSettings:
    """size: P, ranks that share each table. partition: how they share it."""

    size: int = 1
    partition: Partition = "dimension"

    def layout(self, config: UltraMemConfig, rank: int = 0) -> TableLayout:
        """The part of one rank."""
        return TableLayout(
            "replicated" if self.size == 1 else self.partition,
            config.num_values, config.value_dim, config.cores, self.size, rank,
        )  # fmt: skip


def exchange_of(config: UltraMemConfig, size: int, number_bytes: int) -> Exchange:
    """The cost model's view of a memory layer whose table is shared by `size` ranks."""
    return Exchange(
        size=size, picks=config.topk * config.heads, value_dim=config.value_dim,
        expansion=config.value_expansion, cores=config.cores, number_bytes=number_bytes,
        ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", "8")),
    )  # fmt: skip
