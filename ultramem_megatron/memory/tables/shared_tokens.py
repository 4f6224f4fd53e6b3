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
from ultramem_megatron.memory.tables.contract import TableReader


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
    def dot_pauses(self) -> int:
        """See TableReader.dot_pauses."""
        return self.reader.dot_pauses + 1

    def _own_share(self, addresses: Tensor) -> tuple[Tensor, int]:
        """This rank's addresses, and how many tokens fill the shares up."""
        missing = -len(addresses) % self.group.size()  # shares are equal: what fills weighs nothing
        share = (len(addresses) + missing) // self.group.size()
        start = self.group.rank() * share
        return pad(addresses, (0, 0, 0, missing))[start : start + share], missing

    def dot(self, part: Tensor, addresses: Tensor, x: Tensor) -> Pausing:
        """See TableReader.dot."""
        own_addresses, missing = self._own_share(addresses)
        padded = pad(x, (0, 0, 0, missing))
        own_x = take_share(padded, self.group, "shared pre-value inputs").wait()
        products = yield from self.reader.dot(part, own_addresses, own_x)
        gathering = gather_shares(products, self.group, "shared pre-value products")
        yield
        return gathering.wait()[: len(addresses)]

    def read(self, part: Tensor, addresses: Tensor, scores: Tensor) -> Pausing:
        """See TableReader.read."""
        tokens = len(addresses)
        own_addresses, missing = self._own_share(addresses)
        padded = pad(scores, (0, 0, 0, 0, 0, missing))
        own_scores = take_share(padded, self.group, "shared scores").wait()
        pooled = yield from self.reader.read(part, own_addresses, own_scores)
        gathering = gather_shares(pooled, self.group, "shared values")
        yield
        return gathering.wait()[:tokens]
