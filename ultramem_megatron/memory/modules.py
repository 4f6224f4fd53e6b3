"""Query and key normalisation over Dk (paper section 3.2, bag of tricks 5)."""

from torch import nn

from ultramem_megatron.memory.config import Norm


def build_norm(
    kind: Norm, dim: int, eps: float, *, affine: bool = True, bias: bool = False
) -> nn.Module:
    """A norm over the last dimension, `dim` wide; nn.Identity for "none"."""
    if kind == "none":
        return nn.Identity()
    if kind == "rmsnorm":
        return nn.RMSNorm(dim, eps=eps, elementwise_affine=affine)
    return nn.LayerNorm(dim, eps=eps, elementwise_affine=affine, bias=bias)
