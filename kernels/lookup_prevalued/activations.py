"""The function between a pre-value's product with the input and the score it is multiplied by."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

IN_KERNELS = ("none", "relu", "gelu", "silu")
"""Those that the one-pass kernels know; of the others PyTorch's are taken, between two passes.

native.cpp numbers them so.
"""


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function of this name in torch.nn.functional, elementwise; "none": the same again."""
    return (lambda x: x) if name == "none" else getattr(F, name)


def gates_and_slopes(dots: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """act(dots) and its derivative there, both of the shape of dots."""
    if name == "none":
        return dots, torch.ones_like(dots)
    with torch.enable_grad():
        given = dots.detach().requires_grad_()
        gates = activation(name)(given)
        (slopes,) = torch.autograd.grad(gates.sum(), given)
    return gates.detach(), slopes
