"""Reading a table from ranks that hold the same tokens: each reads a share, all get everything.

Without sequence parallelism all tensor-parallel ranks hold the same tokens. What comes before and
after the read is computed on all of them alike, so gradients of the small parameters need no
reduction.

T tokens, the same on every rank of the group; P picks per token, C cores, E groups, V value dim.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from ultramem_megatron.communication.exchange import gather_shares, take_share
from ultramem_megatron.communication.pausing import Pausing
from ultramem_megatron.memory.tables.contract import PreValues, TableReader


@dataclass(frozen=True)
class SharedTokensReader:
    """Any table reader, every token being read by one rank of `group` only."""

    reader: TableReader
    group: Any

    @property
    def pauses(self) -> int:
        """See TableReader.pauses."""
        return self.reader.pauses + 1

    @property
    def prevalued_pauses(self) -> int:
        """See TableReader.prevalued_pauses."""
        return self.reader.prevalued_pauses + 1

    def read(
        self, part: Tensor, addresses: Tensor, scores: Tensor, pre: PreValues | None = None
    ) -> Pausing:
        """See TableReader.read."""
        tokens = len(addresses)
        missing = -tokens % self.group.size()  # shares are equal: what fills up weighs nothing
        share = (tokens + missing) // self.group.size()
        start = self.group.rank() * share
        own_addresses = pad(addresses, (0, 0, 0, missing))[start : start + share]
        padded = pad(scores, (0, 0, 0, 0, 0, missing))
        own_scores = take_share(padded, self.group, "shared scores").wait()
        if pre:
            padded = pre.padded(missing).x
            own_x = take_share(padded, self.group, "shared pre-value inputs").wait()
            pre = pre._replace(x=own_x)
        pooled = yield from self.reader.read(part, own_addresses, own_scores, pre)
        gathering = gather_shares(pooled, self.group, "shared values")
        yield
        return gathering.wait()[:tokens]
