"""What a memory layer saw since the last report, summed on the device, never read in a step."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ultramem_megatron.kernels.read_statistics import add_reads, add_statistics
from ultramem_megatron.memory.read_counts import Counters, counters
from ultramem_megatron.memory.retrieval.addresses import grid_counts
from ultramem_megatron.memory.retrieval.retrieved import Retrieved


@dataclass
class MemoryStatistics:
    """Running sums; `take()` reads and clears them.

    hits: reads per physical value, int32, in the counters of `read_counts.py`.
    """

    num_values: int
    forwards: int = 0
    sums: Tensor | None = None
    hits: Tensor | None = None
    keys_per_side: int | None = None
    """Set it to have reads of the key grid counted too."""
    grid: Tensor | None = None
    wants_recall: bool = False
    """Set it to have the next forward keep `recall`, which takes as long as many."""
    recall: Tensor | None = None
    rows: Tensor | None = None
    """Reads of every row, (N,) int32, where `count_rows` asked for them."""

    @torch.no_grad()
    def record(
        self, query: Tensor, retrieved: Retrieved, addresses: Tensor, output: Tensor, topk: int
    ) -> None:
        """Take in what one forward computed.

        query (T, Q, 2, Dk); retrieved: (T, H*m), within a head best first, with addresses in the
        key grid, before the shuffle; addresses (T, H*m), of the values; output (..., D).
        """
        if addresses.shape[0] == 0:
            return
        device, counting = addresses.device, self.counters.counting()
        if self.sums is None or self.hits is None or self.hits.device != device:
            self.sums = torch.zeros(4, device=device)
            self.hits = torch.zeros(self.counters.number, dtype=torch.int32, device=device)
        scores = retrieved.scores
        add_statistics(self.sums, self.hits, counting, addresses, query, scores, output, topk)
        if self.rows is not None:
            add_reads(self.rows, addresses % self.num_values)
        self.forwards += 1
        if self.keys_per_side is not None:
            counts = grid_counts(retrieved.addresses, self.keys_per_side)
            self.grid = counts if self.grid is None else self.grid + counts

    @property
    def counters(self) -> Counters:
        """What `hits` counts."""
        return counters(self.num_values)

    def take(self) -> tuple[int, Tensor | None, Tensor | None]:
        """Number of forwards; sums over them of the means that `record` takes; hits."""
        taken = self.forwards, self.sums, self.hits
        self.forwards, self.sums, self.hits = 0, None, None
        return taken

    def count_rows(self, device: torch.device) -> None:
        """From now on, count the reads of every row exactly, also of large tables."""
        self.rows = torch.zeros(self.num_values, dtype=torch.int32, device=device)

    def take_rows(self) -> Tensor:
        """Reads of every row since the last call, (N,) int32."""
        assert self.rows is not None, "count_rows was not called"
        taken, self.rows = self.rows, torch.zeros_like(self.rows)
        return taken

    @torch.no_grad()
    def record_recall(self, query: Tensor, measure: Callable[[Tensor], Tensor | None]) -> None:
        """Keep what `measure` finds for the first tokens of query (T, ...), where it is wanted."""
        if self.wants_recall and len(query):
            self.recall, self.wants_recall = measure(query[:_RECALLED].detach()), False

    def take_recall(self) -> Tensor | None:
        """The last that was kept; another is wanted from now on."""
        taken, self.recall, self.wants_recall = self.recall, None, True
        return taken

    def take_grid(self) -> Tensor | None:
        """Reads of the key grid, (B, B); see `grid_counts`."""
        taken, self.grid = self.grid, None
        return taken


_RECALLED = 16
