"""Tables that stay where they were stored, in a mapped file or in host memory.

For decoding and evaluation: of each read, only the rows that it names are brought to the device,
each once. Nothing is written, and nothing has a gradient. A read of a table on disk asks for its
rows and pauses until they have come; a memory's branch (--ultramem-overlap) then computes layers.

R rows that are fetched, V value dim; T tokens, P picks per token, C cores.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ultramem_megatron.communication.pausing import Pausing
from ultramem_megatron.kernels.lookup_prevalued import lookup_prevalued
from ultramem_megatron.kernels.lookup_reduce import lookup_reduce
from ultramem_megatron.memory.retrieval.addresses import split_address
from ultramem_megatron.memory.tables.contract import PreValues
from ultramem_megatron.memory.tables.mapped import bring


class Piece(NamedTuple):
    """Some rows of a table, and of them some columns, as they lie in memory.

    content: (rows, bytes of a row) uint8 on the CPU: in a file numbers need not be aligned.
    """

    rows: range
    columns: range
    content: Tensor


@dataclass(frozen=True)
class StoredTable:
    """A table of numbers of this dtype in pieces that cover it, none of them overlapping.

    on_disk: pieces are mapped from files, so that rows may have to be waited for.
    """

    pieces: tuple[Piece, ...]
    dtype: torch.dtype
    on_disk: bool

    def ask_for(self, rows: Tensor) -> None:
        """Have the disk fetch what `fetch` of the same rows will read, without waiting for it."""
        if self.on_disk:
            for piece in self.pieces:
                bring(piece.content, rows[self._of(piece, rows)] - piece.rows.start)

    def fetch(self, rows: Tensor, width: int) -> Tensor:
        """Rows (R,), int64, ascending and on the CPU, as (R, width) of the table's dtype there."""
        size = self.dtype.itemsize  # bytes
        found = torch.empty(len(rows), width * size, dtype=torch.uint8)
        for piece in self.pieces:
            here = self._of(piece, rows)
            columns = slice(piece.columns.start * size, piece.columns.stop * size)
            found[here, columns] = piece.content[rows[here] - piece.rows.start]
        return found.view(self.dtype)

    @staticmethod
    def _of(piece: Piece, rows: Tensor) -> slice:
        """Which of the ascending rows a piece has."""
        bounds = torch.tensor([piece.rows.start, piece.rows.stop])
        return slice(*torch.searchsorted(rows, bounds).tolist())


@dataclass(frozen=True)
class StoredReader:
    """A TableReader of a whole table that is not on the device.

    The part that it is given has no rows, and says where they are wanted and in what dtype.
    """

    table: StoredTable
    num_values: int
    num_groups: int

    @property
    def pauses(self) -> int:
        """See TableReader: once, for the disk."""
        return int(self.table.on_disk)

    @property
    def prevalued_pauses(self) -> int:
        """See TableReader."""
        return self.pauses

    def read(
        self, part: Tensor, addresses: Tensor, scores: Tensor, pre: PreValues | None = None
    ) -> Pausing:
        """See TableReader.read."""
        rows, groups = split_address(addresses, self.num_values)
        unique, places = rows.unique(return_inverse=True)  # (R,), and where each pick is (T, P)
        unique = unique.cpu()
        for table in (self.table,) if pre is None else (self.table, pre.stored):
            table.ask_for(unique)
        if self.table.on_disk:
            yield
        fetched = self.table.fetch(unique, part.shape[1]).to(part)
        if pre is None:
            return lookup_reduce(fetched, places, groups, scores, self.num_groups)
        before = pre.stored.fetch(unique, pre.part.shape[1]).to(pre.part)
        given = (fetched, before, places, groups, scores, pre.x)
        return lookup_prevalued(*given, self.num_groups, pre.act)
