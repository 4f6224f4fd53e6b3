"""AdamW on rows by PyTorch's own fused kernel: they are copied out, and make step after step.

What the others must equal, on any device. For CPUs PyTorch's kernel computes the last numbers of
each thread's share, where they fill no vector, in higher precision; here no number is among those.
"""

import bisect

import torch
from torch import Tensor

from ultramem_megatron.kernels.adam_rows.contract import Behind, Moments
from ultramem_megatron.kernels.adam_rows.history import AdamStep

_VECTOR = 64  # numbers, a multiple of what any processor's vectors hold


def update(moments: Moments, rows: Tensor, behind: Behind, grad: Tensor | None = None) -> None:
    """Bring rows (u,), int64, which may repeat, up to the last step of the history.

    That step takes their gradient from `grad` (N, V); without one it has none either.
    """
    current, history = behind
    rows = rows[current[rows] < history.count].unique()
    if not len(rows):
        return
    rows = rows[current[rows].argsort(stable=True)]
    made, width = current[rows].tolist(), moments.values.shape[1]
    values, mean, square = parts = [_copied(whole, rows) for whole in moments[:3]]
    gradient = torch.zeros_like(values)
    for number in range(made[0] + 1, history.count + 1):
        if grad is not None and number == history.count:
            gradient = _copied(grad, rows)
        count = bisect.bisect_left(made, number) * width
        _step(history[number], [values, gradient, mean, square], count)
    for whole, part in zip(moments[:3], parts, strict=True):
        whole.index_copy_(0, rows, part[: rows.numel() * width].view(-1, width))
    if moments.copy is not None:
        moments.copy.index_copy_(0, rows, moments.values[rows].to(moments.copy.dtype))
    current.index_fill_(0, rows, history.count)


def _copied(whole: Tensor, rows: Tensor) -> Tensor:
    """Numbers of the rows, one after the other, and zeros until all threads have whole vectors."""
    numbers = whole[rows].flatten()
    return torch.nn.functional.pad(numbers, (0, _rounded_up(len(numbers)) - len(numbers)))


def _rounded_up(count: int) -> int:
    share = _VECTOR * torch.get_num_threads()
    return -(-count // share) * share


def _step(step: AdamStep, parts: list[Tensor], count: int) -> None:
    """On the first `count` numbers of values, gradients, means and squares."""
    end = _rounded_up(count)
    after = [part[count:end].clone() for part in parts]
    dense_step(step, *(part[:end] for part in parts))
    for part, kept in zip(parts, after, strict=True):
        part[count:end] = kept


def dense_step(
    step: AdamStep, values: Tensor, gradient: Tensor, mean: Tensor, square: Tensor
) -> None:
    """PyTorch's fused AdamW on all numbers, in place; of one shape, float32."""
    number = torch.tensor(float(step.number), device=values.device)
    torch._fused_adamw_(
        [values],
        [gradient],
        [mean],
        [square],
        [],
        [number],
        lr=step.lr,
        beta1=step.beta1,
        beta2=step.beta2,
        weight_decay=step.weight_decay,
        eps=step.eps,
        amsgrad=False,
        maximize=False,
    )
