"""The m largest of each row, the same ones on every machine: equal values go lowest index first.

`torch.topk` leaves the choice among equal values open. Here m + 1 values are asked for: where they
strictly fall, the first m are the only answer; rows with equals among them, which are rare but in
half precision, are looked through once more.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def largest(values: Tensor, topk: int) -> Tensor:
    """Indices (..., m) of the m largest of (..., N), best first, equals by lowest index; int64.

    NaN counts as larger than any number.
    """
    rows = values.flatten(0, -2)
    if rows.shape[1] == topk:
        best = _sorted(rows, topk)
    else:
        falling, indices = _two_stage(rows, topk + 1)
        best = indices[:, :topk]
        tied = (~(falling[:, :-1] > falling[:, 1:])).any(1)
        if tied.any():
            best[tied] = _settled(rows[tied], falling[tied, :topk], topk)
    return best.view(*values.shape[:-1], topk)


def _sorted(rows: Tensor, topk: int) -> Tensor:
    return rows.sort(dim=1, descending=True, stable=True).indices[:, :topk]


def _settled(rows: Tensor, falling: Tensor, topk: int) -> Tensor:
    """As `_sorted`, knowing the values of the result, `falling`."""
    if falling[:, 0].isnan().any():
        return _sorted(rows, topk)
    least = falling[:, -1:]
    above, equal = rows > least, rows == least
    room = topk - above.sum(1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))
    best = chosen.nonzero()[:, 1].view(-1, topk)  # lowest index first
    order = rows.gather(1, best).sort(dim=1, descending=True, stable=True).indices
    return best.gather(1, order)


def _two_stage(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the `count` largest, best first.

    They lie in the `count` chunks of largest maximum: those maxima are that many values, and
    nothing in another chunk is above the least of them. Column j of the (c, N/c) view is chunk j.
    """
    length = _chunk_length(rows.shape[1], count)
    if length == 1:
        values, indices = rows.topk(count, dim=1)
        return values, indices
    padded = F.pad(rows, (0, -rows.shape[1] % length), value=float("-inf"))
    chunks = padded.unflatten(1, (length, padded.shape[1] // length))
    best_chunks = chunks.amax(1).topk(count, dim=1, sorted=False).indices
    candidates = chunks.gather(2, best_chunks.unsqueeze(1).expand(-1, length, -1)).flatten(1)
    values, positions = candidates.topk(count, dim=1)
    chunk = best_chunks.gather(1, positions % count)
    return values, positions // count * chunks.shape[2] + chunk


def _chunk_length(columns: int, count: int) -> int:
    """Values per chunk, 1 for a plain topk; measured on a CPU over 256 to 2048 columns."""
    if columns < 15 * count:
        return 1
    return 4 if columns < 30 * count else 8
