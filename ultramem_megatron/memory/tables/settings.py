"""How the value tables of a run are cut: group size and partition."""

import os
from dataclasses import dataclass

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.tables.contract import Partition
from ultramem_megatron.memory.tables.layout import TableLayout
from ultramem_megatron.memory.tables.partitions import PARTITIONS
from ultramem_megatron.memory.tables.traffic import Exchange, address_bytes


@dataclass(frozen=True)
class TableSettings:
    """size: P, ranks that share each table. partition: a name of PARTITIONS, how they share it."""

    size: int = 1
    partition: str = "dimension"

    @property
    def kind(self) -> Partition:
        """The partition; a table of one rank is whole."""
        return PARTITIONS["replicated" if self.size == 1 else self.partition]

    def layout(
        self,
        config: UltraMemConfig,
        rank: int = 0,
        *,
        width: int | None = None,
        cores: int | None = None,
    ) -> TableLayout:
        """The part of one rank; width, cores: of a row, by default those of a value."""
        sizes = (config.num_values, width or config.value_dim, cores or config.cores)
        return self.kind.layout(*sizes, self.size, rank)

    def check(self, config: UltraMemConfig) -> None:
        """Raise UltraMemError for a table that cannot be cut this way, naming what would work."""
        self.kind.check(self.layout(config))
        if self.kind.parts(self.size)[1] > 1 and config.row_widths[-1] % self.size:
            raise UltraMemError(
                f"--ultramem-partition {self.partition} cuts pre-values, too, but "
                f"--ultramem-pre-value-dim {config.row_widths[-1]} is not divisible by "
                f"--ultramem-parallel-size {self.size}. Use a multiple of {self.size}, another "
                f"size, or --ultramem-partition number."
            )


def exchange_of(config: UltraMemConfig, size: int, number_bytes: int) -> Exchange:
    """The cost model's view of a memory layer whose table is shared by `size` ranks."""
    return Exchange(
        size=size,
        picks=config.picks,
        value_dim=config.value_dim,
        pre_dim=sum(config.row_widths[1:]),
        expansion=config.value_expansion,
        cores=config.cores,
        number_bytes=number_bytes,
        address_bytes=address_bytes(config.value_expansion * config.num_values),
        ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", "8")),
    )
