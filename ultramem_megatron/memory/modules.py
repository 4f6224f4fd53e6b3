"""Modules of torch's as a memory layer needs them: construction draws no random numbers."""

import torch
from torch import Tensor, nn

from ultramem_megatron.kernels.row_norm import normed_keys, row_norm
from ultramem_megatron.memory.config import Norm


class Linear(nn.Linear):
    """nn.Linear without the draws at construction, which would shift other modules' values."""

    def reset_parameters(self) -> None:
        """Draw nothing."""


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm with a gain and no bias, by this package's kernels."""

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """x: (..., dim) to the same; with `queries` keys for their products (`normed_keys`)."""
        if queries is not None:
            return normed_keys(x, self.weight, self.eps, True, queries)
        return row_norm(x, self.weight, self.eps, True)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm with a gain, by this package's kernels."""

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """As LayerNorm's."""
        assert self.eps is not None
        if queries is not None:
            return normed_keys(x, self.weight, self.eps, False, queries)
        return row_norm(x, self.weight, self.eps, False)


class BiasedRMSNorm(nn.RMSNorm):
    """nn.RMSNorm and a bias after it, which torch's lacks and the authors' code can have."""

    def __init__(self, dim: int, *, eps: float, elementwise_affine: bool = True) -> None:
        super().__init__(dim, eps=eps, elementwise_affine=elementwise_affine)
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., dim) to the same."""
        return super().forward(x) + self.bias


def build_norm(
    kind: Norm, dim: int, eps: float, *, affine: bool = True, bias: bool = False
) -> nn.Module:
    """Norm of queries or keys over the last dimension, `dim` wide; nn.Identity for "none".

    Paper section 3.2, bag of tricks 5.
    """
    if kind == "none":
        return nn.Identity()
    if affine and not bias:
        return RMSNorm(dim, eps=eps) if kind == "rmsnorm" else LayerNorm(dim, eps=eps, bias=False)
    if kind == "rmsnorm":
        return (BiasedRMSNorm if bias else nn.RMSNorm)(dim, eps=eps, elementwise_affine=affine)
    return nn.LayerNorm(dim, eps=eps, elementwise_affine=affine, bias=bias)


@torch.no_grad()
def zero_bias(linear: nn.Linear) -> None:
    """Set the bias of a projection to 0, if it has one."""
    if linear.bias is not None:
        linear.bias.zero_()


@torch.no_grad()
def fill_gain(norm: nn.Module, gain: float) -> None:
    """Set the weight of a norm, if it has one."""
    weight = getattr(norm, "weight", None)
    if weight is not None:
        weight.fill_(gain)
