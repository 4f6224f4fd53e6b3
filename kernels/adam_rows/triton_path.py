"""AdamW on rows in Triton: a program a row, which makes all steps that it has missed in registers.

Operations, and where two are rounded as one, are those of PyTorch's fused AdamW for GPUs as its
source has them (ATen/native/cuda/fused_adam_utils.cuh). V value dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultramem_megatron.kernels.adam_rows.contract import Behind, Moments
from ultramem_megatron.kernels.adam_rows.history import SLOTS

_COLUMNS_A_WARP = 256
_MOST_WARPS = 16
_STILL = tl.constexpr(2.0**-27)  # these four as in native.cpp
_MOST = tl.constexpr(2.0**-26)
_SMALLEST = tl.constexpr(2.0**-60)
_SMALLEST_SQUARE = tl.constexpr(2.0**-100)


def update(moments: Moments, rows: Tensor, behind: Behind, grad: Tensor | None = None) -> None:
    """As `torch_path.update`."""
    if not rows.numel():
        return
    current, history = behind
    assert all(part is None or part.is_contiguous() for part in (*moments, grad))
    columns = triton.next_power_of_2(moments.values.shape[1])
    warps = min(max(columns // _COLUMNS_A_WARP, 1), _MOST_WARPS)
    with torch.cuda.device_of(rows):
        adam_rows_kernel[(rows.numel(),)](
            *moments[:3],
            moments.values if grad is None else grad,
            moments.values if moments.copy is None else moments.copy,
            rows.contiguous(),
            current,
            history.numbers,
            history.count,
            moments.values.shape[1],
            SLOTS=SLOTS,
            COLUMNS=columns,
            HAS_GRAD=grad is not None,
            HAS_COPY=moments.copy is not None,
            num_warps=warps,
            enable_fp_fusion=False,  # but where fma is written
        )


@triton.jit
def _shrunk(value, mean, square, step):
    """Decay of a value and of its moments in a step without gradient."""
    value = tl.fma(-tl.load(step), value, value)
    mean = tl.fma(tl.load(step + 1), mean, 0.0)
    square = tl.fma(tl.load(step + 2), square, 0.0)
    return value, mean, square


@triton.jit
def _moved_by(mean, square, step):
    root, eps, size = tl.load(step + 4), tl.load(step + 5), tl.load(step + 6)
    return tl.div_rn(size * mean, tl.div_rn(tl.sqrt_rn(square), root) + eps)


@triton.jit(do_not_specialize=["count"])
def adam_rows_kernel(
    values,
    means,
    squares,
    grads,
    copies,
    rows,
    current,
    numbers,
    count,
    width,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_COPY: tl.constexpr,
):
    """Grid (rows,). Of programs with one row the first to say so brings it up to date.

    bound: of what a step moves a value by, as a fraction of it, since one that moved none.
    """
    row = tl.load(rows + tl.program_id(0))
    made = tl.atomic_max(current + row, count)
    if made < count:
        column = tl.arange(0, COLUMNS)
        real = column < width
        place = row * width + column
        value = tl.load(values + place, real, 0.0)
        mean = tl.load(means + place, real, 0.0)
        square = tl.load(squares + place, real, 0.0)
        bound = float("inf")
        for number in range(made + 1, count + 1 - HAS_GRAD):
            step = numbers + (number % SLOTS) * 8
            value, mean, square = _shrunk(value, mean, square, step)
            bound = bound * tl.load(step + 7)
            if not (bound <= _MOST):
                by = _moved_by(mean, square, step)
                size = tl.abs(value)
                bounded = (size >= _SMALLEST) & (square >= _SMALLEST_SQUARE)
                still = (mean == 0.0) | (bounded & (tl.abs(by) <= _STILL * size))
                moving = tl.max(tl.where(still, 0, 1), 0)
                bound = tl.where(moving == 1, float("inf"), _STILL)
                value -= by
        if HAS_GRAD:
            step = numbers + (count % SLOTS) * 8
            grad = tl.load(grads + place, real, 0.0)
            beta1, beta2 = tl.load(step + 1), tl.load(step + 2)
            value = tl.fma(-tl.load(step), value, value)
            mean = tl.fma(beta1, mean, tl.fma(-beta1, grad, grad))
            squared = grad * grad
            square = tl.fma(beta2, square, tl.fma(-beta2, squared, squared))
            value -= _moved_by(mean, square, step)
        tl.store(values + place, value, real)
        tl.store(means + place, mean, real)
        tl.store(squares + place, square, real)
        if HAS_COPY:
            tl.store(copies + place, value.to(copies.dtype.element_ty), real)
