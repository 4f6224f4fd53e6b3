"""Singular values with a gradient, from the decomposition in Triton."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultramem_megatron.kernels.small_svd.triton_kernel import decompose


class SingularValues(torch.autograd.Function):
    """d S_i / d A = u_i v_i^T."""

    @staticmethod
    def forward(ctx: Any, matrices: Tensor) -> Tensor:
        left, values, right = decompose(matrices)
        ctx.save_for_backward(left, right)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        left, right = ctx.saved_tensors
        return (left * grad.unsqueeze(-2)) @ right
