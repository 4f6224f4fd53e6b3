"""Reading a shared table from ranks that decode independently of each other.

In inference the data-parallel ranks of a table group hold different batches: their numbers of
tokens differ, and one finishes before another. Yet every read is a collective. So each read begins
by telling the others how many tokens one brings; all fill up to the largest number, and who has
finished takes part with none until everyone has.

T tokens of this rank, P picks per token, C cores, E expansion groups, V value dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ultramem_megatron.communication.exchange import gather_tokens
from ultramem_megatron.communication.pausing import Pausing, run
from ultramem_megatron.memory.tables.contract import TableReader

_FINISHED = -1


@dataclass(frozen=True)
class LockstepReader:
    """Any table reader, for numbers of tokens that differ between ranks; forward only."""

    reader: TableReader
    group: Any

    @property
    def pauses(self) -> int:
        """See TableReader.pauses."""
        return self.reader.pauses

    def read(self, part: Tensor, addresses: Tensor, scores: Tensor) -> Pausing:
        """See TableReader.read; T may be 0."""
        tokens = len(addresses)
        missing = self._most_tokens(tokens, part.device) - tokens
        pooled = yield from self.reader.read(
            part, pad(addresses, (0, 0, 0, missing)), pad(scores, (0, 0, 0, 0, 0, missing))
        )
        return pooled[:tokens]

    @property
    def dot_pauses(self) -> int:
        """See TableReader.dot_pauses."""
        return self.reader.dot_pauses

    def dot(self, part: Tensor, addresses: Tensor, x: Tensor) -> Pausing:
        """See TableReader.dot; T may be 0."""
        tokens = len(addresses)
        missing = self._most_tokens(tokens, part.device) - tokens
        fill = (0, 0, 0, missing)
        products = yield from self.reader.dot(part, pad(addresses, fill), pad(x, fill))
        return products[:tokens]

    def serve_dot(self, part: Tensor, picks: int, width: int) -> bool:
        """As serve, of one dot with rows of this width."""
        most = self._most_tokens(_FINISHED, part.device)
        if most == _FINISHED:
            return False
        addresses = torch.zeros(most, picks, dtype=torch.int64, device=part.device)
        run(self.reader.dot(part, addresses, torch.zeros(most, width, device=part.device)))
        return True

    def serve(self, part: Tensor, picks: int, cores: int) -> bool:
        """Take part in one read of the others; False if all of them have finished."""
        most = self._most_tokens(_FINISHED, part.device)
        if most == _FINISHED:
            return False
        addresses = torch.zeros(most, picks, dtype=torch.int64, device=part.device)
        scores = torch.zeros(most, picks, cores, device=part.device)
        run(self.reader.read(part, addresses, scores))
        return True

    def _most_tokens(self, own: int, device: torch.device) -> int:
        count = torch.tensor([own], device=device)
        return int(gather_tokens(count, self.group, "numbers of tokens").wait().max())
