"""Which causal convolution runs; see dispatch.py."""

import torch
from torch import Tensor

from ultramem_megatron.kernels.causal_convolution import native_path
from ultramem_megatron.kernels.causal_convolution.reference import (
    causal_convolution_reference,
    causal_convolution_step_reference,
)
from ultramem_megatron.kernels.dispatch import implementation
from ultramem_megatron.kernels.query_centring import Centring, centred_reference


def causal_convolution(
    x: Tensor,
    weight: Tensor,
    history: Tensor | None = None,
    reach: Tensor | None = None,
    centring: Centring | None = None,
) -> Tensor:
    """Same contract as `causal_convolution_reference`.

    centring: of the result, by `centred_reference`; on GPUs in passing, rounded once with it. What
    an implementation has no kernels for (native: float16, float64) PyTorch's own compute.
    """
    chosen = implementation(x.device)
    if chosen == "native" and native_path.serves(x):
        summed: Tensor = native_path.NativeCausalConvolution.apply(x, weight, history, reach)
        return _centred(summed, centring)
    if chosen != "triton":
        return _centred(causal_convolution_reference(x, weight, history, reach), centring)
    from ultramem_megatron.kernels.causal_convolution.fused import (  # needs Triton
        FusedCausalConvolution,
    )

    out: Tensor = FusedCausalConvolution.apply(x, weight, history, reach, centring)
    return out


def causal_convolution_step(
    x: Tensor, weight: Tensor, history: Tensor, centring: Centring | None = None
) -> Tensor:
    """Same contract as `causal_convolution_step_reference`; without a graph one kernel.

    centring: as of `causal_convolution`; its sums do not change.
    """
    chosen = implementation(x.device)
    taken_off = None if centring is None else centring._replace(sums=None)
    if chosen == "native" and not torch.is_grad_enabled() and native_path.serves(x):
        return _centred(native_path.step(x, weight, history), taken_off)
    if chosen != "triton" or torch.is_grad_enabled():
        return _centred(causal_convolution_step_reference(x, weight, history), taken_off)
    from ultramem_megatron.kernels.causal_convolution.fused import step  # needs Triton

    return step(x, weight, history, None if centring is None else centring.mean)


def _centred(x: Tensor, centring: Centring | None) -> Tensor:
    return x if centring is None else centred_reference(x, centring)
