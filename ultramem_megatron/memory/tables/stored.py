"""Tables that stay where they were stored, in a mapped file or in host memory.

For decoding and evaluation: of each read, only the rows that it names are brought to the device,
each once. Nothing is written, and nothing has a gradient.

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


class Piece(NamedTuple):
    """Some rows of a table, and of them some columns, as they lie in memory.

    content: (rows, bytes of a row) uint8 on the CPU: in a file numbers need not be aligned.
    """

    rows: range
    columns: range
    content: Tensor


@dataclass(frozen=True)
class StoredTable:
    """A table of numbers of this dtype in pieces that cover it, none of them overlapping."""

    pieces: tuple[Piece, ...]
    dtype: torch.dtype

    def fetch(self, rows: Tensor, width: int) -> Tensor:
        """Rows (R,), int64, ascending and on the CPU, as (R, width) of the table's dtype there."""
        size = self.dtype.itemsize  # bytes
        found = torch.empty(len(rows), width * size, dtype=torch.uint8)
        for piece in self.pieces:
            bounds = torch.tensor([piece.rows.start, piece.rows.stop])
            first, end = torch.searchsorted(rows, bounds).tolist()
            columns = slice(piece.columns.start * size, piece.columns.stop * size)
            found[first:end, columns] = piece.content[rows[first:end] - piece.rows.start]
        return found.view(self.dtype)


@dataclass(frozen=True)
class StoredReader:
    """A TableReader of a whole table that is not on the device.

    The part that it is given has no rows, and says where they are wanted and in what dtype.
    """

    table: StoredTable
    num_values: int
    num_groups: int
    pauses = 0
    prevalued_pauses = 0

    def read(
        self, part: Tensor, addresses: Tensor, scores: Tensor, pre: PreValues | None = None
    ) -> Pausing:
        """See TableReader.read."""
        yield from ()
        rows, groups = split_address(addresses, self.num_values)
        unique, places = rows.unique(return_inverse=True)  # (R,), and where each pick is (T, P)
        fetched = self._fetched(self.table, unique, part)
        if pre is None:
            return lookup_reduce(fetched, places, groups, scores, self.num_groups)
        assert pre.stored is not None, "values are stored, pre-values are not"
        before = self._fetched(pre.stored, unique, pre.part)
        given = (fetched, before, places, groups, scores, pre.x)
        return lookup_prevalued(*given, self.num_groups, pre.act)

    def _fetched(self, table: StoredTable, unique: Tensor, part: Tensor) -> Tensor:
        """These rows as `part` is, (R, V)."""
        return table.fetch(unique.cpu(), part.shape[1]).to(part)
