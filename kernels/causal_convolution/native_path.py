"""Causal convolution through native.cpp, one call each way. Letters as in reference.py."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultramem_megatron.kernels.native.library import call_native, native_library

_KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def serves(x: Tensor) -> bool:
    """Whether there are native kernels for inputs of this dtype on this machine."""
    return x.dtype in _KINDS and native_library() is not None


class NativeCausalConvolution(torch.autograd.Function):
    """Same contract as `causal_convolution_reference`, for float32 and bfloat16."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, history: Tensor | None, reach: Tensor | None
    ) -> Tensor:
        x = x.contiguous()
        history = None if history is None else history.to(x.dtype).contiguous()
        reach = None if reach is None else reach.long().contiguous()
        ctx.save_for_backward(x, weight, history, reach)
        out = torch.empty_like(x)
        given = (x, _by_tap(weight), history, reach, out)
        call_native(f"convolution_forward_{_KINDS[x.dtype]}", *given, *_sizes(x, weight, history))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight, history, reach = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_history = None if history is None else torch.empty_like(history)
        by_tap = _by_tap(weight.detach())
        grad_by_tap = torch.empty_like(by_tap)
        given = (grad.contiguous(), x, by_tap, history, reach, grad_x, grad_history, grad_by_tap)
        call_native(f"convolution_backward_{_KINDS[x.dtype]}", *given, *_sizes(x, weight, history))
        return grad_x, grad_by_tap.t().to(weight.dtype), grad_history, None


def step(x: Tensor, weight: Tensor, history: Tensor) -> Tensor:
    """Same contract as `causal_convolution_step_reference`, without a graph."""
    assert history.is_contiguous(), "written in place"
    assert history.dtype == x.dtype, "what is read moves into it"
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    given = (x.contiguous(), _by_tap(weight), history, out)
    call_native(f"convolution_step_{_KINDS[x.dtype]}", *given, *x.shape[1:], weight.shape[1])
    return out


def _by_tap(weight: Tensor) -> Tensor:
    """(K, D), float32."""
    return weight.new_empty(*weight.shape[::-1], dtype=torch.float32).copy_(weight.t())


def _sizes(x: Tensor, weight: Tensor, history: Tensor | None) -> tuple[int, ...]:
    pieces = 1 if history is None else len(history)
    return pieces, len(x) // pieces, *x.shape[1:], weight.shape[1]
