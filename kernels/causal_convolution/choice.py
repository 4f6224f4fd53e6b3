"""Which causal convolution runs; see dispatch.py."""

import torch
from torch import Tensor

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
    """Same contract as `causal_convolution_reference`, which CPUs take.

    centring: of the result, by `centred_reference`; on GPUs in passing, rounded once with it.
    """
    if implementation(x.device) != "triton":
        return _centred(causal_convolution_reference(x, weight, history, reach), centring)
    from ultramem_megatron.kernels.causal_convolution.fused import (  # needs Triton
        FusedCausalConvolution,
    )

    out: Tensor = FusedCausalConvolution.apply(x, weight, history, reach, centring)
    return out


def causal_convolution_step(
    x: Tensor, weight: Tensor, history: Tensor, centring: Centring | None = None
) -> Tensor:
    """Same contract as `causal_convolution_step_reference`; on GPUs without a graph one kernel.

    centring: as of `causal_convolution`; its sums do not change.
    """
    if implementation(x.device) != "triton" or torch.is_grad_enabled():
        centring = None if centring is None else centring._replace(sums=None)
        return _centred(causal_convolution_step_reference(x, weight, history), centring)
    from ultramem_megatron.kernels.causal_convolution.fused import step  # needs Triton

    return step(x, weight, history, None if centring is None else centring.mean)


def _centred(x: Tensor, centring: Centring | None) -> Tensor:
    return x if centring is None else centred_reference(x, centring)
