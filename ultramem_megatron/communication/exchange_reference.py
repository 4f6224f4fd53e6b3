"""The exchanges in the plainest form: all ranks' tensors in one process, moved by indexing.

What exchange.py must do between processes; tests hold the two together.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def gather_tokens_reference(per_rank: Sequence[Tensor]) -> list[Tensor]:
    """What each rank gets: everybody's (T, ...) one after another."""
    everything = torch.cat(list(per_rank))
    return [everything for _ in per_rank]


def all_to_all_reference(
    per_rank: Sequence[Tensor], send_sizes: Sequence[Sequence[int]] | None = None
) -> list[Tensor]:
    """What each rank gets: the rows meant for it, by sender.

    send_sizes[r][q]: rows that rank r sends to rank q, in order; None: equal parts. With two ranks
    that hold [a, b, c] and [d], and sizes [[1, 2], [0, 1]]: rank 0 gets [a], rank 1 [b, c, d].
    """
    size = len(per_rank)
    if send_sizes is None:
        send_sizes = [[len(x) // size] * size for x in per_rank]
    parts = [x.split(list(sizes)) for x, sizes in zip(per_rank, send_sizes, strict=True)]
    return [
        torch.cat([parts[sender][receiver] for sender in range(size)]) for receiver in range(size)
    ]
