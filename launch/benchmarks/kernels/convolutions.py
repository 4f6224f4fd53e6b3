"""Ways to convolve the queries' input over time: ours, and PyTorch's grouped convolution."""

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.benchmarks.kernels.candidate import Candidate, implementations
from launch.benchmarks.kernels.shapes import Shape
from ultramem_megatron.kernels.causal_convolution import causal_convolution

_TAPS = 5  # the paper's models


def candidates(shape: Shape, device: torch.device) -> list[Candidate]:
    """One sequence of hidden states; the reference first."""

    def draw(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=shape.dtype).requires_grad_()

    x, weight = draw(shape.tokens, 1, shape.hidden), draw(shape.hidden, _TAPS)

    def ours() -> Tensor:
        return causal_convolution(x, weight)

    def plain() -> Tensor:
        by_channel = F.pad(x.permute(1, 2, 0), (_TAPS - 1, 0))
        out = F.conv1d(by_channel, weight.unsqueeze(1), groups=shape.hidden)
        return out.permute(2, 0, 1).contiguous()

    def gradients() -> dict[str, Tensor]:
        return {n: t.grad for n, t in (("x", x), ("weight", weight)) if t.grad is not None}

    # PyTorch's way is the reference.
    names = [name for name in implementations(device) if name != "torch"]
    ways = [(name, ours, name) for name in names] + [("conv1d", plain, "")]
    return [
        Candidate(
            name=name, forward=forward, leaves=(x, weight), gradients=gradients, kernels=kernels
        )
        for name, forward, kernels in ways
    ]
