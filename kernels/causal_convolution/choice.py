"""Which causal convolution runs; see dispatch.py."""

from torch import Tensor

from ultramem_megatron.kernels.causal_convolution.reference import causal_convolution_reference
from ultramem_megatron.kernels.dispatch import implementation


def causal_convolution(
    x: Tensor, weight: Tensor, history: Tensor | None = None, reach: Tensor | None = None
) -> Tensor:
    """Same contract as `causal_convolution_reference`, which CPUs take."""
    if implementation(x.device) != "triton":
        return causal_convolution_reference(x, weight, history, reach)
    from ultramem_megatron.kernels.causal_convolution.fused import (  # needs Triton
        FusedCausalConvolution,
    )

    out: Tensor = FusedCausalConvolution.apply(x, weight, history, reach)
    return out
