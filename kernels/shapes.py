"""A result without numbers, for tensors on the meta device: what autograd would keep is kept."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def kept_for_backward(
    shape: Sequence[int], dtype: torch.dtype, *tensors: Tensor, keep_result: bool = False
) -> Tensor:
    """An empty result of this shape on the device of `tensors`, differentiable in all of them.

    Autograd keeps `tensors` for the backward, and the result if asked to; gradients are empty.
    """
    result: Tensor = _Kept.apply(tuple(shape), dtype, keep_result, *tensors)
    return result


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shape: Any, dtype: Any, keep_result: bool, *tensors: Tensor) -> Tensor:
        result = tensors[0].new_empty(shape, dtype=dtype)
        ctx.save_for_backward(*tensors, *([result] if keep_result else []))
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        needed = ctx.needs_input_grad[3:]
        kept = ctx.saved_tensors[: len(needed)]
        gradients = (
            torch.empty_like(tensor) if needs else None
            for tensor, needs in zip(kept, needed, strict=True)
        )
        return None, None, None, *gradients
