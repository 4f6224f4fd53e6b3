"""How context parallelism deals out a sequence: of 2*R chunks, rank r of R has r and 2*R-1-r.

Megatron does so (`get_batch_on_this_cp_rank`) that ranks have equal work under a causal mask.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ultramem_megatron.communication.exchange import gather_and_sum


def own_chunks(sequence: Tensor, group: dist.ProcessGroup, dim: int = 0) -> Tensor:
    """The rank's two chunks of a tensor that holds the whole sequence along `dim`."""
    chunks = sequence.chunk(2 * group.size(), dim)
    return torch.cat((chunks[group.rank()], chunks[2 * group.size() - 1 - group.rank()]), dim)


def gather_in_order(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(s/R, ...) of every rank as (s, ...) in the sequence's order; gradients are summed."""
    # As gathered: 0, 2R-1, 1, 2R-2, ...
    chunks = gather_and_sum(own, group, "sequence").wait().chunk(2 * group.size())
    return torch.cat((*chunks[::2], *reversed(chunks[1::2])))
