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
from ultramem_megatron.memory.tables.contract import PreValues, TableReader

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

    @property
    def prevalued_pauses(self) -> int:
        """See TableReader.prevalued_pauses."""
        return self.reader.prevalued_pauses

    def read(
        self, part: Tensor, addresses: Tensor, scores: Tensor, pre: PreValues | None = None
    ) -> Pausing:
        """See TableReader.read; T may be 0."""
        tokens = len(addresses)
        missing = self._most_tokens(tokens, part.device) - tokens
        pooled = yield from self.reader.read(
            part,
            pad(addresses, (0, 0, 0, missing)),
            pad(scores, (0, 0, 0, 0, 0, missing)),
            pre.padded(missing) if pre else None,
        )
        return pooled[:tokens]

    def serve(self, part: Tensor, picks: int, cores: int, pre: PreValues | None = None) -> bool:
        """Take part in one read of the others; False if all of them have finished.

        pre: with inputs of no token.
        """
        most = self._most_tokens(_FINISHED, part.device)
        if most == _FINISHED:
            return False
        addresses = torch.zeros(most, picks, dtype=torch.int64, device=part.device)
        scores = torch.zeros(most, picks, cores, device=part.device)
        run(self.reader.read(part, addresses, scores, pre.padded(most) if pre else None))
        return True

    def _most_tokens(self, own: int, device: torch.device) -> int:
        count = torch.tensor([own], device=device)
        return int(gather_tokens(count, self.group, "numbers of tokens").wait().max())
