"""TableLayout: which rows and columns of a value table each of P ranks holds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TableLayout:
    """An N x Dv table in row_parts x column_parts pieces, one for each of P ranks.

    Neighbouring ranks hold pieces of the same columns. Row parts differ in size by at most one row;
    column parts are equal.
    """

    num_values: int
    value_dim: int
    cores: int
    row_parts: int = 1
    column_parts: int = 1
    rank: int = 0

    @property
    def size(self) -> int:
        """P: ranks that share the table."""
        return self.row_parts * self.column_parts

    def rows(self, rank: int | None = None) -> range:
        """Rows held by a rank (default: this one)."""
        part = (self.rank if rank is None else rank) % self.row_parts
        return range(self.first_row(part), self.first_row(part + 1))

    def first_row(self, part: int) -> int:
        """First row of a row part; that of part `row_parts` is N."""
        return self.num_values * part // self.row_parts

    def columns(self, rank: int | None = None) -> range:
        """Columns held by a rank (default: this one)."""
        part = (self.rank if rank is None else rank) // self.row_parts
        width = self.value_dim // self.column_parts
        return range(part * width, (part + 1) * width)

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
