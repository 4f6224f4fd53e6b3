"""What a memory layer saw since the last report, summed on the device, never read in a step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ultramem_megatron.memory.retrieval.addresses import grid_counts


@dataclass
class MemoryStatistics:
    """Running sums; `take()` reads and clears them.

    The histogram counts reads per physical value: int32 of length N, small beside a row of Dv.
    """

    num_values: int
    forwards: int = 0
    sums: Tensor | None = None
    hits: Tensor | None = None
    keys_per_side: int | None = None
    """Set it to have reads of the key grid counted too."""
    grid: Tensor | None = None

    @torch.no_grad()
    def record(
        self, rows: Tensor, addresses: Tensor, scores: Tensor, output: Tensor, topk: int
    ) -> None:
        """rows, addresses (T, H*m); scores (T, H*m, C), within a head best first; output (..., D).

        addresses: in the key grid, before the shuffle.
        """
        if rows.shape[0] == 0:
            return
        if self.sums is None or self.hits is None or self.hits.device != rows.device:
            self.sums = torch.zeros(3, device=rows.device)
            self.hits = torch.zeros(self.num_values, dtype=torch.int32, device=rows.device)
        flat = rows.flatten()
        self.hits.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        means = (scores[:, ::topk].mean(), scores.mean(), output.float().std())
        self.sums += torch.stack([mean.float() for mean in means])
        self.forwards += 1
        if self.keys_per_side is not None:
            counts = grid_counts(addresses, self.keys_per_side)
            self.grid = counts if self.grid is None else self.grid + counts

    def take(self) -> tuple[int, Tensor | None, Tensor | None]:
        """Number of forwards; sums of mean top-1 score, mean top-m score and output std; hits."""
        taken = self.forwards, self.sums, self.hits
        self.forwards, self.sums, self.hits = 0, None, None
        return taken

    def take_grid(self) -> Tensor | None:
        """Reads of the key grid, (B, B); see `grid_counts`."""
        taken, self.grid = self.grid, None
        return taken
