"""AdamW on rows with smaller moments: the mean in few bits, and one number a row for the square.

A row's second moment is that of the mean of its squared gradient (Adafactor's factor of the rows,
arXiv 1804.04235, and none of the columns). Codes of the mean are multiples of the row's largest.
What a step without gradient does to either is a factor for the whole row, so codes stay as they
are, and rows may be brought up to date at any time, by any rank. Where ranks have columns of a row
each, a step with gradient adds up its squares over them, and finds the largest mean (RowsOver).

N table rows, u of them, V value dim.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ultramem_megatron.kernels.adam_rows.choice import update as update_dense
from ultramem_megatron.kernels.adam_rows.contract import Behind, Moments
from ultramem_megatron.kernels.adam_rows.history import AdamStep
from ultramem_megatron.kernels.adam_rows.rounding import Rounding

KINDS = {"factored": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""How the mean is kept, by name."""
AT_ONCE = 2**16
"""Rows whose moments are in float32 at a time."""
_NOTHING = 2.0**-100


def moment_bytes(kind: str) -> int:
    """Of both moments of a number; kind: float32, AdamW's own, or of KINDS, 8 more a row."""
    return KINDS[kind].itemsize if kind in KINDS else 8


def _as_it_is(numbers: Tensor) -> Tensor:
    return numbers


class RowsOver(NamedTuple):
    """The ranks that have equally many columns each of this one's rows; by default it has all.

    total, largest: of numbers (u,), one a row of each rank, the same on every rank; collectives.
    """

    ranks: int = 1
    total: Callable[[Tensor], Tensor] = _as_it_is
    largest: Callable[[Tensor], Tensor] = _as_it_is


class CodedRows:
    """(N, V) numbers, of each row codes and the largest of its sizes; zero at first."""

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        over: RowsOver | None = None,
    ) -> None:
        """dtype: of codes, one of KINDS. over: whose largest counts."""
        self.codes = torch.zeros(shape, dtype=dtype, device=device)
        self.over = over or RowsOver()
        self.largest = torch.zeros(shape[0], device=device)
        """(N,) float32."""
        self._most = 1 if dtype.is_floating_point else torch.iinfo(dtype).max

    def read(self, rows: Tensor) -> Tensor:
        """(u, V) float32."""
        return self.codes[rows].float() * (self.largest[rows] / self._most)[:, None]

    def write(self, rows: Tensor, numbers: Tensor) -> None:
        """numbers: (u, V) float32; rows whose largest is below 2^-100 become zero."""
        largest = self.over.largest(numbers.abs().amax(1))
        kept = largest >= _NOTHING  # also not NaN
        largest = torch.where(kept, largest, 0.0)
        codes = torch.where(kept[:, None], numbers / largest[:, None] * self._most, 0.0)
        if not self.codes.is_floating_point():
            codes = codes.round()
        self.codes.index_copy_(0, rows, codes.to(self.codes.dtype))
        self.largest.index_copy_(0, rows, largest)

    def shrink(self, rows: Tensor, by: Tensor) -> None:
        """Multiply rows by factors (u,), which change no code."""
        largest = self.largest[rows] * by
        self.largest.index_copy_(0, rows, torch.where(largest >= _NOTHING, largest, 0.0))


class CompactMoments(NamedTuple):
    """A table as AdamW trains it, moved in place; see Moments."""

    values: Tensor
    """(N, V) float32, or bfloat16 with a rounding."""
    mean: CodedRows
    square: Tensor
    """(N,) float32."""
    copy: Tensor | None = None
    rounding: Rounding | None = None


def compact(
    kind: str,
    values: Tensor,
    copy: Tensor | None,
    over: RowsOver | None = None,
    rounding: Rounding | None = None,
) -> CompactMoments:
    """Before the first step; kind: of KINDS. over: the ranks that have other columns."""
    rows, columns = values.shape
    mean = CodedRows((rows, columns), KINDS[kind], values.device, over)
    return CompactMoments(values, mean, torch.zeros(rows, device=values.device), copy, rounding)


def update(
    moments: CompactMoments, rows: Tensor, behind: Behind, grad: Tensor | None = None
) -> None:
    """Bring rows (u,), int64, which may repeat, up to the last step of the history.

    With `grad` (N, V) they have made all steps before it, and that one takes their gradient.
    """
    current, history = behind
    rows = rows[current[rows] < history.count].unique()
    for some in rows.split(AT_ONCE) if len(rows) else ():
        values, mean = moments.values[some].float(), moments.mean.read(some)
        if grad is None:
            _catch_up(moments, values, mean, some, behind)
        else:
            _step(history[history.count], grad[some], moments, values, mean, some)
        if moments.rounding is None:
            moments.values.index_copy_(0, some, values)
        else:
            number = history[history.count].number
            moments.values.index_copy_(0, some, moments.rounding.rounded(values, some, number))
        if moments.copy is not None:
            moments.copy.index_copy_(0, some, values.to(moments.copy.dtype))
        current.index_fill_(0, some, history.count)


def _catch_up(
    moments: CompactMoments, values: Tensor, mean: Tensor, rows: Tensor, behind: Behind
) -> None:
    """AdamW's own steps on values (u, V), in place; moments shrink by the powers of the betas."""
    made, history, square = behind.current[rows], behind.history, moments.square[rows]
    missed = (history.count - made).double()
    piece = Moments(values, mean, _wide(square, mean))
    update_dense(piece, torch.arange(len(rows), device=rows.device), Behind(made, history))
    step = history[history.count]  # a history has the same betas throughout
    moments.mean.shrink(rows, (step.beta1**missed).float())
    moments.square.index_copy_(0, rows, square * (step.beta2**missed).float())


def _step(
    step: AdamStep,
    grad: Tensor,
    moments: CompactMoments,
    values: Tensor,
    mean: Tensor,
    rows: Tensor,
) -> None:
    """One with a gradient (u, V) on values and mean (u, V), in place; a collective."""
    over = moments.mean.over
    mean.lerp_(grad, 1 - step.beta1)
    moments.mean.write(rows, mean)
    squared = over.total(grad.square().sum(1)) / (grad.shape[1] * over.ranks)
    square = moments.square[rows].mul_(step.beta2).add_(squared, alpha=1 - step.beta2)
    moments.square.index_copy_(0, rows, square)
    root = (square / (1 - step.beta2**step.number)).sqrt() + step.eps
    values.mul_(1 - step.lr * step.weight_decay)
    values.addcdiv_(mean, root[:, None], value=-step.lr / (1 - step.beta1**step.number))


def expand(moments: CompactMoments) -> tuple[Tensor, Tensor]:
    """Mean and square (N, V) in float32, as AdamW has them."""
    mean = torch.empty_like(moments.values, dtype=torch.float32)
    for rows in _all_rows(moments):
        mean.index_copy_(0, rows, moments.mean.read(rows))
    return mean, _wide(moments.square, mean)


def pack(moments: CompactMoments, mean: Tensor, square: Tensor) -> None:
    """Take over AdamW's mean and square (N, V); a collective."""
    over = moments.mean.over
    for rows in _all_rows(moments):
        moments.mean.write(rows, mean[rows])
        whole = over.total(square[rows].sum(1)) / (square.shape[1] * over.ranks)
        moments.square.index_copy_(0, rows, whole)


def _wide(square: Tensor, like: Tensor) -> Tensor:
    return square[:, None].expand_as(like).contiguous()


def _all_rows(moments: CompactMoments) -> tuple[Tensor, ...]:
    return torch.arange(len(moments.values), device=moments.values.device).split(AT_ONCE)
