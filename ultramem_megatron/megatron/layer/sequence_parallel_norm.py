"""Torch's norms under sequence parallelism, which Megatron's own wrapper of them refuses.

Where neither Transformer Engine nor Apex is installed, Megatron falls back to torch's norms, and
asserts that sequence parallelism is off. All they lack is the tag by which Megatron sums their
gradients over the tensor-parallel ranks.
"""

from typing import Any

from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


def sequence_parallel_norm(
    *, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
) -> nn.Module:
    """A torch LayerNorm or RMSNorm whose gradients are summed over tensor-parallel ranks."""
    kind = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
    norm = kind(hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.data = parameter.data.to(config.params_dtype)
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron's tag
    return norm


def allowed_norm(norm: Any, config: TransformerConfig) -> Any:
    """The norm of a spec, or its replacement where Megatron would refuse to build it."""
    return sequence_parallel_norm if config.sequence_parallel and norm is WrappedTorchNorm else norm
