"""Reads of one memory's values over all ranks that see its tokens, each rank holding a part.

No rank gets all counters: each adds up a part of them (a reduce-scatter of at most 32 MB), and only
sums over the parts are reduced over all.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from ultramem_megatron.memory.read_counts import Counters, Figures, Sums, figures, sums

_ENDLESS = 2**62


class ReadsOfValues:
    """Since the log line before; making one is a collective."""

    def __init__(
        self, hits: Tensor | None, kind: Counters, reads: float, device: torch.device, group: Any
    ) -> None:
        """hits: this rank's counters, of this kind; None: no forward. reads: of all ranks."""
        self.kind, self.reads, self.group = kind, reads, group
        if hits is None:
            hits = torch.zeros(kind.number, dtype=torch.int32, device=device)
        padded = pad(hits.long(), (0, -len(hits) % group.size()))
        part = padded.new_empty(len(padded) // group.size())
        dist.reduce_scatter_tensor(part, padded, group=group)
        self.first = group.rank() * len(part)
        self.part = part[: max(0, kind.number - self.first)]
        found = sums(self.part, self.first, kind, reads)
        added = torch.cat([found.used.view(1), found.often, found.seldom])
        dist.all_reduce(added, group=group)
        self.figures: Figures = figures(Sums(added[0], added[1:4], added[4:]), kind, reads)

    def histogram(self, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values by their reads, (K+1,): below bounds[0], below bounds[1] ...; least and most.

        Of a sample where values share counters, scaled up to all values; the most is then that of
        a counter, which may be shared. A collective.
        """
        own = self.part[: max(0, self.kind.own - self.first)]
        numbers = torch.bucketize(own, bounds, right=True).bincount(minlength=len(bounds) + 1)
        # A rank may hold no counter; a minimum of negative numbers is a maximum.
        ends = torch.stack([pad(own, (0, 1), value=_ENDLESS).min(), -pad(self.part, (0, 1)).max()])
        dist.all_reduce(numbers, group=self.group)
        dist.all_reduce(ends, dist.ReduceOp.MIN, group=self.group)
        return numbers.double() * (self.kind.num_values / self.kind.own), ends[0], -ends[1]
