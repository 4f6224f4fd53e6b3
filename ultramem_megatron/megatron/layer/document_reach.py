"""How far back the query convolution may see: as far as attention, within a token's document.

Several documents stand in one sequence under --reset-attention-mask, whose masks forbid attention
between them, and in packed ones, whose boundaries kernels are given. The reach of a token, (S, B),
is how many inputs before it are of its document, at most K-1 for K taps.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ultramem_megatron.communication.sequence_chunks import own_chunks
from ultramem_megatron.errors import UltraMemError


def masked_reach(
    x: Tensor,
    taps: int,
    tensor_group: dist.ProcessGroup | None,
    context_group: dist.ProcessGroup,
    mask: Tensor,
) -> Tensor:
    """From an attention mask (B or 1, 1, queries, S of the whole sequence), True where forbidden.

    x: this rank's (S, B, D). tensor_group: ranks that share the sequence further, by sequence
    parallelism; None without it. Queries are those of the context-parallel rank.
    """
    positions = torch.arange(mask.shape[-1], device=x.device)
    if context_group.size() > 1:
        positions = own_chunks(positions, context_group)
    if mask.dim() != 4 or mask.shape[2] != len(positions):
        raise UltraMemError(
            f"An attention mask {tuple(mask.shape)} for {len(positions)} tokens: the query "
            f"convolution cannot tell the ends of documents. Use --ultramem-query-conv-kernel 0."
        )
    own = _share(len(x), tensor_group)
    positions, rows = positions[own], mask[:, 0, own].expand(x.shape[1], -1, -1)
    before = positions[:, None] - torch.arange(1, taps, device=x.device)  # (S, K-1)
    forbidden = rows.gather(2, before.clamp(min=0).expand(x.shape[1], -1, -1))
    seen = ~forbidden & (before >= 0)
    return seen.int().cumprod(2).sum(2).t()


def packed_reach(
    count: int,
    taps: int,
    tensor_group: dist.ProcessGroup | None,
    context_group: dist.ProcessGroup,
    packed: Any,
) -> Tensor:
    """From the boundaries of packed documents (PackedSeqParams). count: this rank's tokens."""
    if context_group.size() > 1:
        raise UltraMemError(
            f"--ultramem-query-conv-kernel {taps} cannot be combined with packed documents under "
            f"--context-parallel-size {context_group.size()}, which cuts each of them. Drop one."
        )
    padded = packed.cu_seqlens_q_padded
    boundaries = packed.cu_seqlens_q if padded is None else padded
    shares = 1 if tensor_group is None else tensor_group.size()
    tokens = torch.arange(count * shares, device=boundaries.device)[_share(count, tensor_group)]
    document = torch.searchsorted(boundaries, tokens.to(boundaries.dtype), right=True) - 1
    return (tokens - boundaries[document]).clamp(max=taps - 1).unsqueeze(1)


def _share(count: int, tensor_group: dist.ProcessGroup | None) -> slice:
    first = 0 if tensor_group is None else tensor_group.rank() * count
    return slice(first, first + count)
