"""Who keeps a table's rows may ask to be told which are about to be read.

AdamW on rows leaves those that nobody reads behind (`adam_rows/`). N table rows.
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


def is_kept(table: Tensor) -> bool:
    """Whether its rows have an `Upkeep`."""
    return getattr(table, UPKEEP, None) is not None


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
