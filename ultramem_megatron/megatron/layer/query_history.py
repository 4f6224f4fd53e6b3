"""What the query convolution sees before a rank's tokens: other ranks' tokens, or a step's before.

A rank's tokens are P pieces of equal length, each without gaps in time: P = 2 where context
parallelism gives it two chunks of the sequence. K taps see K-1 inputs before each piece.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from ultramem_megatron.communication.sequence_chunks import gather_in_order, own_chunks
from ultramem_megatron.errors import UltraMemError


def neighbours_history(
    x: Tensor, taps: int, tensor_group: dist.ProcessGroup | None, context_group: dist.ProcessGroup
) -> Tensor:
    """Inputs before each piece, (P, K-1, B, D); zeros before the sequence's first.

    x: this rank's (S, B, D). tensor_group: ranks that share the sequence further, by sequence
    parallelism; None without it. Each rank sends the ends of its pieces only.
    """
    shares = 1 if tensor_group is None else tensor_group.size()
    # With an even number of shares, the two chunks meet where a share ends.
    pieces = 2 if context_group.size() > 1 and shares % 2 else 1
    cut = x.reshape(pieces, -1, *x.shape[1:])
    ends = cut[:, -min(taps - 1, cut.shape[1]) :].contiguous()
    if tensor_group is not None and shares > 1:
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        ends = gather_from_sequence_parallel_region(ends, group=tensor_group)
    if context_group.size() > 1:
        ends = gather_in_order(ends, context_group)
    histories = []
    for piece in _own_pieces(len(ends), pieces, tensor_group, context_group):
        # Of pieces shorter than a history all is there: it may reach over several.
        before = ends[:piece].flatten(0, 1)[max(0, piece * ends.shape[1] - (taps - 1)) :]
        histories.append(pad(before, (0, 0, 0, 0, taps - 1 - len(before), 0)))
    return torch.stack(histories)


def _own_pieces(
    total: int,
    pieces: int,
    tensor_group: dist.ProcessGroup | None,
    context_group: dist.ProcessGroup,
) -> list[int]:
    """Where in the sequence this rank's pieces stand, counted in pieces."""
    numbers = torch.arange(total, device="cpu")
    if context_group.size() > 1:
        numbers = own_chunks(numbers, context_group)
    first = 0 if tensor_group is None else tensor_group.rank() * pieces
    return [int(number) for number in numbers[first : first + pieces]]


def paged_history(x: Tensor, taps: int, layer_number: int, context: Any) -> Tensor:
    """Dynamic batching: inputs before each of the packed tokens, (T, K-1, 1, D).

    x: (T, 1, D). Inputs are kept in blocks, at the places that the context gives to the tokens'
    keys, so that blocks shared by requests (prefix caching) serve here too. Takes D numbers for
    every key that the cache has room for.

    Raises UltraMemError if x has not all tokens of the step, as under sequence parallelism.
    """
    count, view = context.padded_active_token_count, context.gpu_view
    if len(x) != count:
        raise UltraMemError(
            f"The query convolution got {len(x)} of {count} tokens of a decoding step. Decode "
            f"without sequence parallelism."
        )
    caches = context.__dict__.setdefault("ultramem_query_inputs", {})
    if layer_number not in caches:
        blocks = context.kv_block_allocator.total_count
        caches[layer_number] = x.new_zeros(blocks, context.block_size_tokens, x.shape[-1])
    cache: Tensor = caches[layer_number]
    places = view.token_to_local_position_within_kv_block[:count].long()
    cache[view.token_to_block_idx[:count], places] = x[:, 0]
    # A row for each active request; rows of padding tokens may be any. All of it is read on the
    # device, in memory that stays where it is, so that a CUDA graph of one step serves the next.
    attention = context.active_attn_metadata["mha_metadata"].state_data
    table, ends = attention["block_table"], attention["cu_query_seq_lengths"][1:]
    rows = torch.searchsorted(
        ends, torch.arange(count, dtype=ends.dtype, device=x.device), right=True
    )
    rows = rows.clamp(0, len(table) - 1).unsqueeze(1)
    before = torch.arange(1 - taps, 0, device=x.device)
    positions = view.token_to_pos_ids[:count].unsqueeze(1) + before
    columns = (positions // cache.shape[1]).clamp(0, table.shape[1] - 1)
    inputs = cache[table[rows, columns].long(), positions % cache.shape[1]]
    return inputs.where(positions.unsqueeze(-1) >= 0, 0).unsqueeze(2)


def kept_inputs(layer_number: int, context: Any) -> Tensor | None:
    """Static batching: the (K-1, B, D) inputs before this step's; None at a prompt's start."""
    kept: Tensor | None = None
    if context.sequence_len_offset:
        kept = _kept(context).get((layer_number, context.batch_size_offset))
    return kept


def keep_inputs(x: Tensor, kept: Tensor | None, taps: int, layer_number: int, context: Any) -> None:
    """Keep the last K-1 of `kept` and x (S, B, D) in the context, as it keeps keys and values."""
    before = x.new_zeros(taps - 1, *x.shape[1:]) if kept is None else kept
    last = torch.cat([before, x.detach()])[len(x) :].clone()
    _kept(context)[layer_number, context.batch_size_offset] = last


def _kept(context: Any) -> dict[tuple[int, int], Tensor]:
    inputs: dict[tuple[int, int], Tensor] = context.__dict__.setdefault(
        "ultramem_query_history", {}
    )
    return inputs
