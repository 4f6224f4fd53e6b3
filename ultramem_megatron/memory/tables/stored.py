"""Tables that stay where they were stored, in a mapped file or in host memory.

For decoding and evaluation: of each read, only the rows that it names are brought to the device,
each once. Nothing is written, and nothing has a gradient. A read of a table on disk asks for its
rows and pauses until they have come; a memory's branch (--ultramem-overlap) then computes layers. A
GPU reads tables in host memory, which are pinned, where they lie: its lookup's kernels take their
addresses (unified addressing), and the host waits for nothing.

R rows that are fetched, N rows of a table, V value dim; T tokens, P picks per token, C cores.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ultramem_megatron.communication.pausing import Pausing
from ultramem_megatron.kernels.dispatch import implementation
from ultramem_megatron.kernels.lookup_prevalued import lookup_prevalued, lookup_prevalued_quantized
from ultramem_megatron.kernels.lookup_prevalued.activations import IN_KERNELS
from ultramem_megatron.kernels.lookup_reduce import lookup_quantized, lookup_reduce
from ultramem_megatron.kernels.quantized import QuantizedRows
from ultramem_megatron.memory.retrieval.addresses import split_address
from ultramem_megatron.memory.tables.contract import PreValues
from ultramem_megatron.memory.tables.hot_rows import HotRows
from ultramem_megatron.memory.tables.mapped import bring


class Piece(NamedTuple):
    """Some rows of a table, and of them some columns, as they lie in memory.

    content: (rows, bytes of a row) uint8 on the CPU: in a file numbers need not be aligned.
    """

    rows: range
    columns: range
    content: Tensor


class StoredTable(Protocol):
    """A table that is not on the device.

    values: (N, V) in host memory, where a GPU can read it; None: rows have to be fetched. Tables
    that are read together are all of one kind.
    """

    @property
    def values(self) -> Tensor | QuantizedRows | None:
        """See above."""
        ...

    def ask_for(self, rows: Tensor) -> None:
        """Have fetched what `fetch` of the same rows will read, without waiting for it."""
        ...

    def fetch(self, rows: Tensor, width: int) -> Tensor:
        """Rows (R,), int64, ascending and on the CPU, as (R, width) in their own dtype."""
        ...


@dataclass(frozen=True)
class DiskTable:
    """Numbers of this dtype in pieces of mapped files, which cover it; none of them overlap."""

    pieces: tuple[Piece, ...]
    dtype: torch.dtype
    values = None

    def ask_for(self, rows: Tensor) -> None:
        """See StoredTable."""
        for piece in self.pieces:
            bring(piece.content, rows[self._of(piece, rows)] - piece.rows.start)

    def fetch(self, rows: Tensor, width: int) -> Tensor:
        """See StoredTable."""
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
class HostTable:
    """All of a table in host memory, (N, V); pinned where there is a GPU."""

    values: Tensor

    def ask_for(self, rows: Tensor) -> None:
        """See StoredTable: it is there."""

    def fetch(self, rows: Tensor, width: int) -> Tensor:
        """See StoredTable."""
        return self.values[rows]


@dataclass(frozen=True)
class QuantizedHostTable:
    """The same in 8 bits."""

    values: QuantizedRows

    def ask_for(self, rows: Tensor) -> None:
        """See StoredTable: it is there."""

    def fetch(self, rows: Tensor, width: int) -> Tensor:
        """See StoredTable; decoded, in float32."""
        return self.values.at(rows)


class CachedTable:
    """A table behind a cache of its rows in the device's memory."""

    values = None

    def __init__(self, table: StoredTable, rows: int, like: Tensor) -> None:
        """rows: how many the cache holds. like: a tensor of its device and dtype."""
        self._table, self._like = table, like
        self.hot = HotRows(rows)

    def ask_for(self, rows: Tensor) -> None:
        """See StoredTable."""
        self._table.ask_for(rows[~self.hot.holds(rows.to(self._like.device)).cpu()])

    def fetch(self, rows: Tensor, width: int) -> Tensor:
        """See StoredTable; on the device."""

        def missing(rows: Tensor) -> tuple[Tensor]:
            return (self._table.fetch(rows.cpu(), width).to(self._like),)

        (found,) = self.hot.read(rows.to(self._like.device), missing)
        return found


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
        """See TableReader: once, for rows that are fetched."""
        return int(self.table.values is None)

    @property
    def prevalued_pauses(self) -> int:
        """See TableReader."""
        return self.pauses

    def read(
        self, part: Tensor, addresses: Tensor, scores: Tensor, pre: PreValues | None = None
    ) -> Pausing:
        """See TableReader.read."""
        rows, groups = split_address(addresses, self.num_values)
        if self.table.values is not None and _read_where_they_lie(part, pre):
            return self._in_kernels(self.table.values, rows, groups, scores, pre, part.dtype)
        unique, places = rows.unique(return_inverse=True)  # (R,), and where each pick is (T, P)
        unique = unique.cpu()
        for table in (self.table,) if pre is None else (self.table, pre.stored):
            table.ask_for(unique)
        for _ in range(self.pauses):
            yield
        fetched = self.table.fetch(unique, part.shape[1]).to(part)
        if pre is None:
            return lookup_reduce(fetched, places, groups, scores, self.num_groups)
        before = pre.stored.fetch(unique, pre.part.shape[1]).to(pre.part)
        given = (fetched, before, places, groups, scores, pre.x)
        return lookup_prevalued(*given, self.num_groups, pre.act)

    def _in_kernels(
        self,
        values: Tensor | QuantizedRows,
        rows: Tensor,
        groups: Tensor,
        scores: Tensor,
        pre: PreValues | None,
        dtype: torch.dtype,
    ) -> Tensor:
        picked = (rows, groups, scores)
        if pre is not None:
            tables, given = (values, pre.stored.values), (*picked, pre.x, self.num_groups, pre.act)
            if isinstance(values, QuantizedRows):
                return lookup_prevalued_quantized(*tables, *given, dtype)
            return lookup_prevalued(*tables, *given)
        if isinstance(values, QuantizedRows):
            return lookup_quantized(values, *picked, self.num_groups, dtype)
        return lookup_reduce(values, *picked, self.num_groups)


def _read_where_they_lie(part: Tensor, pre: PreValues | None) -> bool:
    """Whether kernels read a table in host memory themselves."""
    in_kernels = pre is None or pre.act in IN_KERNELS
    return implementation(part.device) == "triton" and in_kernels
