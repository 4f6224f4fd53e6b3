"""AdamW on rows with smaller moments: the mean in few bits, and one number a row for the square.

A row's second moment is that of the mean of its squared gradient (Adafactor's factor of the rows,
arXiv 1804.04235, and none of the columns). Codes of the mean are multiples of the row's largest.
What a step without gradient does to either is a factor for the whole row, so codes stay as they
are, and rows may be brought up to date at any time, by any rank.

N table rows, u of them, V value dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ultramem_megatron.kernels.adam_rows.choice import update as update_dense
from ultramem_megatron.kernels.adam_rows.contract import Behind, Moments
from ultramem_megatron.kernels.adam_rows.history import AdamStep

KINDS = {"factored": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""How the mean is kept, by name."""
AT_ONCE = 2**16
"""Rows whose moments are in float32 at a time."""
_NOTHING = 2.0**-100


def moment_bytes(kind: str) -> int:
    """Of both moments of a number; kind: float32, AdamW's own, or of KINDS, 8 more a row."""
    return KINDS[kind].itemsize if kind in KINDS else 8


class CodedRows:
    """(N, V) numbers, of each row codes and the largest of its sizes; zero at first."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        """dtype: of codes, one of KINDS."""
        self.codes = torch.zeros(shape, dtype=dtype, device=device)
        self.largest = torch.zeros(shape[0], device=device)
        """(N,) float32."""
        self._most = 1 if dtype.is_floating_point else torch.iinfo(dtype).max

    def read(self, rows: Tensor) -> Tensor:
        """(u, V) float32."""
        return self.codes[rows].float() * (self.largest[rows] / self._most)[:, None]

    def write(self, rows: Tensor, numbers: Tensor) -> None:
        """numbers: (u, V) float32; rows whose largest is below 2^-100 become zero."""
        largest = numbers.abs().amax(1)
        kept = largest >= _NOTHING  # also not NaN
        largest = torch.where(kept, largest, 0.0)
        codes = torch.where(kept[:, None], numbers / largest[:, None] * self._most, 0.0)
        if not self.codes.is_floating_point():
            codes = codes.round()
        self.codes.index_copy_(0, rows, codes.to(self.codes.dtype))
        self.largest.index_copy_(0, rows, largest)


class CompactMoments(NamedTuple):
    """A table as AdamW trains it, moved in place; see Moments."""

    values: Tensor
    """(N, V) float32."""
    mean: CodedRows
    square: Tensor
    """(N,) float32."""
    copy: Tensor | None = None


def compact(kind: str, values: Tensor, copy: Tensor | None) -> CompactMoments:
    """Before the first step; kind: of KINDS."""
    rows, columns = values.shape
    mean = CodedRows((rows, columns), KINDS[kind], values.device)
    return CompactMoments(values, mean, torch.zeros(rows, device=values.device), copy)


def update(
    moments: CompactMoments, rows: Tensor, behind: Behind, grad: Tensor | None = None
) -> None:
    """Bring rows (u,), int64, which may repeat, up to the last step of the history.

    With `grad` (N, V) they have made all steps before it, and that one takes their gradient.
    """
    current, history = behind
    rows = rows[current[rows] < history.count].unique()
    for some in rows.split(AT_ONCE):
        mean, square = moments.mean.read(some), moments.square[some]
        values = moments.values[some]
        if grad is None:
            square = _catch_up(Moments(values, mean, _wide(square, mean)), some, behind)
        else:
            _step(history[history.count], grad[some], values, mean, square)
        moments.values.index_copy_(0, some, values)
        if moments.copy is not None:
            moments.copy.index_copy_(0, some, values.to(moments.copy.dtype))
        moments.mean.write(some, mean)
        moments.square.index_copy_(0, some, square)
        current.index_fill_(0, some, history.count)


def _catch_up(piece: Moments, rows: Tensor, behind: Behind) -> Tensor:
    """AdamW's own steps, in place; all columns of a square stay the same. Returns it (u,)."""
    own = Behind(behind.current[rows], behind.history)
    update_dense(piece, torch.arange(len(rows), device=rows.device), own)
    return piece.square[:, 0]


def _step(step: AdamStep, grad: Tensor, values: Tensor, mean: Tensor, square: Tensor) -> None:
    mean.lerp_(grad, 1 - step.beta1)
    square.mul_(step.beta2).add_(grad.square().mean(1), alpha=1 - step.beta2)
    root = (square / (1 - step.beta2**step.number)).sqrt() + step.eps
    values.mul_(1 - step.lr * step.weight_decay)
    values.addcdiv_(mean, root[:, None], value=-step.lr / (1 - step.beta1**step.number))


def expand(moments: CompactMoments) -> tuple[Tensor, Tensor]:
    """Mean and square (N, V) in float32, as AdamW has them."""
    mean = torch.empty_like(moments.values)
    for rows in _all_rows(moments):
        mean.index_copy_(0, rows, moments.mean.read(rows))
    return mean, _wide(moments.square, mean)


def pack(moments: CompactMoments, mean: Tensor, square: Tensor) -> None:
    """Take over AdamW's mean and square (N, V)."""
    for rows in _all_rows(moments):
        moments.mean.write(rows, mean[rows])
    moments.square.copy_(square.mean(1))


def _wide(square: Tensor, like: Tensor) -> Tensor:
    return square[:, None].expand_as(like).contiguous()


def _all_rows(moments: CompactMoments) -> tuple[Tensor, ...]:
    return torch.arange(len(moments.values), device=moments.values.device).split(AT_ONCE)
