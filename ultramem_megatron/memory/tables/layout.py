"""TableLayout: which rows and columns of a value table each of P ranks holds."""

from dataclasses import dataclass
from typing import Literal

from ultramem_megatron.errors import UltraMemError

Partition = Literal["replicated", "number", "dimension"]


@dataclass(frozen=True)
class TableLayout:
    """An N x Dv table over P ranks.

    number: rank p holds a range of rows, sizes differing by at most one. dimension: rank p holds
    the columns p*Dv/P .. (p+1)*Dv/P of all rows. replicated: every rank holds everything (P = 1).
    """

    partition: Partition
    num_values: int
    value_dim: int
    cores: int
    size: int = 1
    rank: int = 0

    def rows(self, rank: int | None = None) -> range:
        """Rows held by a rank (default: this one)."""
        rank = self.rank if rank is None else rank
        if self.partition != "number":
            return range(self.num_values)
        return range(self.first_row(rank), self.first_row(rank + 1))

    def first_row(self, rank: int) -> int:
        """First row of a rank's range; that of rank P is N."""
        return self.num_values * rank // self.size

    def columns(self, rank: int | None = None) -> range:
        """Columns held by a rank (default: this one)."""
        rank = self.rank if rank is None else rank
        if self.partition != "dimension":
            return range(self.value_dim)
        width = self.value_dim // self.size
        return range(rank * width, (rank + 1) * width)

    def cores_of(self, rank: int) -> range:
        """Cores whose value slices a rank's columns belong to."""
        width = self.value_dim // self.cores
        columns = self.columns(rank)
        return range(columns.start // width, (columns.stop - 1) // width + 1)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of this rank's part."""
        return len(self.rows()), len(self.columns())

    def describe(self) -> str:
        """This rank's part in words."""
        rows, columns = self.rows(), self.columns()
        return (
            f"rows {rows.start}-{rows.stop - 1} of {self.num_values}, "
            f"columns {columns.start}-{columns.stop - 1} of {self.value_dim}"
        )


def dimension_wise_fits(value_dim: int, cores: int, size: int) -> bool:
    """Whether columns can be cut over `size` ranks with no core's slice straddling two ranks."""
    return value_dim % size == 0 and (size % cores == 0 or cores % size == 0)


def check_layout(layout: TableLayout) -> None:
    """Raise UltraMemError for a table that cannot be cut this way, naming what would work."""
    size = layout.size
    if layout.partition == "number" and layout.num_values < size:
        raise UltraMemError(
            f"--ultramem-parallel-size is {size}, more than the {layout.num_values} values of a "
            f"table (--ultramem-num-keys squared). Use a smaller size or more keys."
        )
    if layout.partition != "dimension":
        return
    if layout.value_dim % size:
        raise UltraMemError(
            f"--ultramem-partition dimension cuts the value dimension, but --ultramem-value-dim "
            f"{layout.value_dim} is not divisible by --ultramem-parallel-size {size}. Use a "
            f"multiple of {size}, another size, or --ultramem-partition number."
        )
    if not dimension_wise_fits(layout.value_dim, layout.cores, size):
        raise UltraMemError(
            f"--ultramem-partition dimension with --ultramem-parallel-size {size} would make the "
            f"slices of --ultramem-cores {layout.cores} straddle ranks: one must divide the other. "
            f"Use another size, other cores, or --ultramem-partition number."
        )
