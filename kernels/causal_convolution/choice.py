"""Which causal convolution runs; see dispatch.py."""

import torch
from torch import Tensor

from ultramem_megatron.kernels.causal_convolution import native_path
from ultramem_megatron.kernels.causal_convolution.reference import (
    causal_convolution_reference,
    causal_convolution_step_reference,
)
from ultramem_megatron.kernels.dispatch import implementation


def causal_convolution(
    x: Tensor, weight: Tensor, history: Tensor | None = None, reach: Tensor | None = None
) -> Tensor:
    """Same contract as `causal_convolution_reference`.

    What an implementation has no kernels for (native: float16, float64) PyTorch's own compute.
    """
    chosen = implementation(x.device)
    if chosen == "native" and native_path.serves(x):
        summed: Tensor = native_path.NativeCausalConvolution.apply(x, weight, history, reach)
        return summed
    if chosen != "triton":
        return causal_convolution_reference(x, weight, history, reach)
    from ultramem_megatron.kernels.causal_convolution.fused import (  # needs Triton
        FusedCausalConvolution,
    )

    out: Tensor = FusedCausalConvolution.apply(x, weight, history, reach)
    return out


def causal_convolution_step(x: Tensor, weight: Tensor, history: Tensor) -> Tensor:
    """Same contract as `causal_convolution_step_reference`; without a graph one kernel."""
    chosen = implementation(x.device)
    if chosen == "native" and not torch.is_grad_enabled() and native_path.serves(x):
        return native_path.step(x, weight, history)
    if chosen != "triton" or torch.is_grad_enabled():
        return causal_convolution_step_reference(x, weight, history)
    from ultramem_megatron.kernels.causal_convolution.fused import step  # needs Triton

    return step(x, weight, history)
