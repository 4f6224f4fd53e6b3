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
    """How ranks share each table.

    size: P, how many. partition: a name of PARTITIONS. node_size: neighbours among them that share
    fast links; None: as many ranks as were launched on this host, or 8 where none were.
    """

    size: int = 1
    partition: str = "dimension"
    node_size: int | None = None

    @property
    def node(self) -> int:
        """Ranks of a table that are in one node."""
        return min(self.size, ranks_per_node(self.node_size))

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
        return self.kind.layout(*sizes, self.size, rank, node=self.node)

    def check(self, config: UltraMemConfig) -> None:
        """Raise UltraMemError for a table that cannot be cut this way, naming what would work."""
        layout = self.layout(config)
        self.kind.check(layout)
        slices = layout.column_parts
        if config.row_widths[-1] % slices:
            whole = slices == self.size
            parts = f"--ultramem-parallel-size {slices}" if whole else f"{slices} groups of columns"
            raise UltraMemError(
                f"--ultramem-partition {self.partition} cuts pre-values, too, but "
                f"--ultramem-pre-value-dim {config.row_widths[-1]} is not divisible by "
                f"{parts}. Use a multiple of {slices}, another size, or --ultramem-partition "
                f"number."
            )


def ranks_per_node(given: int | None) -> int:
    """Ranks that share fast links: as given, as launched on this host, or 8."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "8")) if given is None else given


def exchange_of(
    config: UltraMemConfig, size: int, number_bytes: int, node_size: int | None = None
) -> Exchange:
    """The cost model's view of a memory layer whose table is shared by `size` ranks.

    node_size: as in TableSettings.
    """
    return Exchange(
        size=size,
        picks=config.picks,
        value_dim=config.value_dim,
        pre_dim=sum(config.row_widths[1:]),
        expansion=config.value_expansion,
        cores=config.cores,
        number_bytes=number_bytes,
        address_bytes=address_bytes(config.value_expansion * config.num_values),
        ranks_per_node=ranks_per_node(node_size),
    )
