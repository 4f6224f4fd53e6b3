"""Who keeps a table's rows may ask to be told which are about to be read, or bring them.

AdamW on rows leaves those that nobody reads behind (`adam_rows/`), and rows may lie in another
memory than what reads them. N table rows, R of them that a read names, V value dim.
"""

from typing import Protocol

from torch import Tensor

UPKEEP = "ultramem_upkeep"
"""Attribute of a table with its `Upkeep`, if it has one."""


class Upkeep(Protocol):
    """What a table's rows wait for."""

    def read(self, rows: Tensor) -> None:
        """Make ready `rows`, int64 of 0..N-1, which may repeat; before a forward reads them."""
        ...

    def catch_up(self) -> None:
        """Make ready all rows."""
        ...


ELSEWHERE = "ultramem_elsewhere"
"""Attribute of what stands for a table whose rows are not there: who brings them."""


class Elsewhere(Protocol):
    """Where a table's rows are, if not in what stands for it (of its shape, dtype and device)."""

    def bring(self, rows: Tensor) -> Tensor:
        """Copies (R, V) of `rows` (R,), int64 and distinct, where they are read.

        Differentiable: what is added to their gradient goes to where the rows are.
        """
        ...


def is_kept(table: Tensor) -> bool:
    """Whether somebody has to know which of its rows are read."""
    return any(getattr(table, tag, None) is not None for tag in (UPKEEP, ELSEWHERE))


def brought(rows: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
    """`rows`, and the tables that they are of; of tables elsewhere, copies of those rows.

    rows: int64, which may repeat; then come back as rows of the copies.
    """
    homes: list[Elsewhere | None] = [getattr(table, ELSEWHERE, None) for table in tables]
    if None in homes:
        return rows, *tables
    distinct, places = rows.unique(return_inverse=True)
    return places, *(home.bring(distinct) for home in homes if home is not None)


def about_to_read(table: Tensor, rows: Tensor) -> None:
    """Called by each lookup with the rows it will read."""
    upkeep: Upkeep | None = getattr(table, UPKEEP, None)
    if upkeep is not None:
        upkeep.read(rows)


def about_to_read_all(table: Tensor) -> None:
    """To be called before anything else looks at a table that is trained."""
    upkeep: Upkeep | None = getattr(table, UPKEEP, None)
    if upkeep is not None:
        upkeep.catch_up()
