"""Causal convolution on GPUs: one kernel forward, which centres in passing, one backward.

Letters as in reference.py. Sums over rows (of the result, of the weight's gradient) are one more.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultramem_megatron.kernels.causal_convolution.triton_kernels import (
    backward_kernel,
    forward_kernel,
    step_kernel,
)
from ultramem_megatron.kernels.column_sums import column_sums
from ultramem_megatron.kernels.query_centring import Centring
from ultramem_megatron.kernels.query_centring.triton_kernels import add_parts

FORWARD = {"BLOCK_R": 8, "BLOCK_D": 256, "num_warps": 4}
"""Rows of a time step and sequence, and channels, of a program: 16 bytes a thread and load."""

BACKWARD = {"BLOCK_R": 2, "BLOCK_D": 256, "num_warps": 1}
"""One warp has all rows of a channel in a thread, so the weight's gradient needs no exchange."""

STEP = {"BLOCK_R": 2, "BLOCK_D": 256, "num_warps": 2}
"""A decoding step has few rows: narrow programs, so that there are many."""

ROWS = 64
"""Rows that one program of the backward sums the weight's gradient over."""


class FusedCausalConvolution(torch.autograd.Function):
    """Same contract as `causal_convolution_reference`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        history: Tensor | None,
        reach: Tensor | None,
        centring: Centring | None,
    ) -> Tensor:
        mean, sums = (None, None) if centring is None else centring
        x = x.contiguous()
        history = None if history is None else history.to(x.dtype).contiguous()
        reach = None if reach is None else reach.contiguous()
        ctx.save_for_backward(x, weight, history, reach)
        out = torch.empty_like(x)
        pieces, shift, rows, channels = _sizes(x, history)
        if out.numel():
            parts = pieces * triton.cdiv(rows, FORWARD["BLOCK_R"])
            partial = out if sums is None else sums.new_empty(parts, channels)
            with torch.cuda.device_of(x):
                forward_kernel[(parts, triton.cdiv(channels, FORWARD["BLOCK_D"]))](
                    x,
                    weight.contiguous(),
                    x if history is None else history,
                    x if reach is None else reach,
                    x if mean is None else mean,
                    out,
                    partial,
                    rows,
                    shift,
                    channels,
                    WITH_MEAN=mean is not None,
                    WITH_SUMS=sums is not None,
                    **_kinds(x, weight, history, reach),
                    **FORWARD,
                )
                if sums is not None:
                    add_parts(partial, sums, len(x) * x.shape[1])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, history, reach = ctx.saved_tensors
        pieces, shift, rows, channels = _sizes(x, history)
        grad_x = torch.empty_like(x)
        grad_history = None if history is None else torch.empty_like(history)
        taps = weight.shape[1]
        parts = triton.cdiv((taps - 1) * shift + rows, ROWS)  # of a piece
        precise = torch.float64 if x.dtype == torch.float64 else torch.float32
        partial = x.new_empty(pieces * parts, taps * channels, dtype=precise)
        if partial.numel():
            with torch.cuda.device_of(x):
                backward_kernel[(pieces * parts, triton.cdiv(channels, BACKWARD["BLOCK_D"]))](
                    grad.contiguous(),
                    x,
                    weight.contiguous(),
                    x if history is None else history,
                    x if reach is None else reach,
                    grad_x,
                    x if grad_history is None else grad_history,
                    partial,
                    rows,
                    shift,
                    channels,
                    parts,
                    TILES=ROWS // BACKWARD["BLOCK_R"],
                    SLOTS=triton.next_power_of_2(taps),
                    **_kinds(x, weight, history, reach),
                    **BACKWARD,
                )
                grad_weight = column_sums(partial, weight.dtype, taps)
        else:
            grad_weight = torch.zeros_like(weight)
        return grad_x, grad_weight, grad_history, None, None


def step(x: Tensor, weight: Tensor, history: Tensor, mean: Tensor | None) -> Tensor:
    """Same contract as `causal_convolution_step_reference`, without a graph, less a mean (D,)."""
    assert history.is_contiguous(), "written in place"
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _, rows, channels = x.shape
    if out.numel():
        blocks = triton.cdiv(rows, STEP["BLOCK_R"]), triton.cdiv(channels, STEP["BLOCK_D"])
        with torch.cuda.device_of(x):
            step_kernel[blocks](
                x.contiguous(),
                weight.contiguous(),
                history,
                x if mean is None else mean,
                out,
                rows,
                channels,
                WITH_MEAN=mean is not None,
                TAPS=weight.shape[1],
                PRECISE=tl.float64 if x.dtype == torch.float64 else tl.float32,
                **STEP,
            )
    return out


def _sizes(x: Tensor, history: Tensor | None) -> tuple[int, int, int, int]:
    """L pieces, B rows from one time step to the next, S/L*B rows of a piece, D channels."""
    pieces = 1 if history is None else len(history)
    return pieces, x.shape[1], len(x) // pieces * x.shape[1], x.shape[2]


def _kinds(
    x: Tensor, weight: Tensor, history: Tensor | None, reach: Tensor | None
) -> dict[str, Any]:
    return {
        "TAPS": weight.shape[1],
        "WITH_HISTORY": history is not None,
        "WITH_REACH": reach is not None,
        "PRECISE": tl.float64 if x.dtype == torch.float64 else tl.float32,
    }
