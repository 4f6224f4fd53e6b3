"""A cache of the rows that are read most, before a table that is in host memory or on disk.

Its slots are in sets of WAYS, and each row belongs to one set. A slot counts the reads of its row,
up to MOST. A row that is missing takes a slot of its set whose count is 0; where no count is, one
is taken off all of them (J. Misra and D. Gries, Finding repeated elements, 1982): rows that are
read often stay, those read once go again. What it holds are copies, so that results do not change.

Folders for transformers hold this file, too: it imports torch alone. R rows that are read.
"""

from collections.abc import Callable

import torch
from torch import Tensor

WAYS = 8
MOST = 15
_NO_ROW = -1


class HotRows:
    """The cache of one table; empty until its first read, on whose device it then is."""

    def __init__(self, rows: int) -> None:
        """rows: how many it holds, in whole sets; at least one set."""
        self._sets = max(1, rows // WAYS)
        self._kept: tuple[Tensor, ...] = ()
        self.reads = 0
        """Rows that were asked for, each once a read."""
        self.hits = 0
        """Those of them that were here."""

    @property
    def bytes(self) -> int:
        """Of the rows that it has room for; 0 before the first read."""
        return sum(kept.nbytes for kept in self._kept)

    def holds(self, rows: Tensor) -> Tensor:
        """Which of the rows (R,), int64, are here, (R,)."""
        if not self._kept:
            return torch.zeros_like(rows, dtype=torch.bool)
        return self._matches(rows).any(1)

    def missing(self, rows: Tensor) -> Tensor:
        """Those of the rows, int64 of any shape, that are not here, each once."""
        rows = rows.unique()
        return rows[~self.holds(rows)]

    def read(
        self, rows: Tensor, fetch: Callable[[Tensor], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """What `fetch` gives for distinct rows (R,): tensors (R, ...), always as many.

        It is asked for those alone that are not here.
        """
        here = self.holds(rows)
        missing = rows[~here]
        fetched = fetch(missing)
        if not self._kept:
            self._make_room(rows, fetched)
        slots = self._slots(rows[here])
        self.reads, self.hits = self.reads + len(rows), self.hits + len(slots)
        found = []
        for kept, new in zip(self._kept, fetched, strict=True):
            both = new.new_empty(len(rows), *new.shape[1:])
            both[here], both[~here] = kept[slots], new
            found.append(both)
        counts = self._counts.view(-1)
        counts[slots] = (counts[slots] + 1).clamp(max=MOST)
        self._take_in(missing, fetched)
        return tuple(found)

    def _make_room(self, rows: Tensor, like: tuple[Tensor, ...]) -> None:
        self._kept = tuple(x.new_zeros(self._sets * WAYS, *x.shape[1:]) for x in like)
        self._rows = rows.new_full((self._sets, WAYS), _NO_ROW)
        self._counts = rows.new_zeros((self._sets, WAYS), dtype=torch.int8)

    def _matches(self, rows: Tensor) -> Tensor:
        """Which slot of its set has a row, (R, WAYS)."""
        return self._rows[rows % self._sets] == rows.unsqueeze(1)

    def _slots(self, rows: Tensor) -> Tensor:
        """Where rows are that are here, (R,)."""
        return rows % self._sets * WAYS + self._matches(rows).byte().argmax(1)

    def _take_in(self, rows: Tensor, fetched: tuple[Tensor, ...]) -> None:
        """Rows (R,) that were missing, as far as slots are free; else counts fall."""
        sets, order = (rows % self._sets).sort(stable=True)
        place = torch.arange(len(sets), device=rows.device) - torch.searchsorted(sets, sets)
        by_count, ways = self._counts[sets].sort(dim=1, stable=True)  # (R, WAYS), free ones first
        within = place.clamp(max=WAYS - 1).unsqueeze(1)
        free = (by_count.gather(1, within).squeeze(1) == 0) & (place < WAYS)
        slots = (sets * WAYS + ways.gather(1, within).squeeze(1))[free]
        taken = order[free]
        self._rows.view(-1)[slots] = rows[taken]
        full = sets[~free].unique()
        self._counts[full] = (self._counts[full] - 1).clamp(min=0)
        self._counts.view(-1)[slots] = 1
        for kept, new in zip(self._kept, fetched, strict=True):
            kept[slots] = new[taken]
