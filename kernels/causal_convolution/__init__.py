"""Causal depthwise convolution over time, in pieces, within documents."""

from ultramem_megatron.kernels.causal_convolution.choice import (
    causal_convolution,
    causal_convolution_step,
)
from ultramem_megatron.kernels.causal_convolution.reference import (
    causal_convolution_reference,
    causal_convolution_step_reference,
)

__all__ = [
    "causal_convolution",
    "causal_convolution_reference",
    "causal_convolution_step",
    "causal_convolution_step_reference",
]
