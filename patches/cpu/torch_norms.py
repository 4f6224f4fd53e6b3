"""Torch's norms where Megatron's wrapper refuses: sequence parallelism, a gain centred on zero.

Also an input in float32 beside half-precision weights, as --fp32-residual-connection gives it.
Megatron falls back to torch's norms where neither Transformer Engine nor Apex is installed.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm

from ultramem_megatron.patches.patch import Editor, Patch

_NORM = "megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__"
_PARAMETERS = (
    "cls",
    "config",
    "hidden_size",
    "eps",
    "persist_layer_norm",
    "zero_centered_gamma",
    "normalization",
)


class WideLayerNorm(nn.LayerNorm):
    """LayerNorm computed in float32, result in its weights' type; `gain_offset` + weight scales."""

    gain_offset = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width), any floating type."""
        gain = self.weight.float() + self.gain_offset
        shift = None if self.bias is None else self.bias.float()
        normed = layer_norm(x.float(), self.normalized_shape, gain, shift, self.eps)
        return normed.to(self.weight.dtype)


class WideRMSNorm(nn.RMSNorm):
    """The same of RMSNorm."""

    gain_offset = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width), any floating type."""
        gain = self.weight.float() + self.gain_offset
        normed = rms_norm(x.float(), tuple(self.normalized_shape), gain, self.eps)
        return normed.to(self.weight.dtype)


def _new(original: Any) -> Any:
    def new(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> nn.Module:
        centred = config.layernorm_zero_centered_gamma
        plain = copy.copy(config)
        plain.sequence_parallel = plain.layernorm_zero_centered_gamma = False
        norm: nn.Module = original(cls, plain, hidden_size, eps)
        if centred or config.fp32_residual_connection:
            norm = _wide(norm, hidden_size, eps, centred)
        for parameter in norm.parameters():
            # Under sequence parallelism gradients are summed over the tensor-parallel ranks.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron's tag
        return norm

    return new


def _wide(norm: nn.Module, hidden_size: int, eps: float, centred: bool) -> nn.Module:
    kind = WideRMSNorm if isinstance(norm, nn.RMSNorm) else WideLayerNorm
    wide = kind(hidden_size, eps=eps)
    if centred:
        wide.gain_offset = 1.0
        with torch.no_grad():
            wide.weight.zero_()
    return wide


def _install(editor: Editor) -> None:
    editor.wrap(_NORM, _new, _PARAMETERS)


PATCH = Patch(
    name="cpu.torch_norms",
    symbols=(_NORM,),
    reason="WrappedTorchNorm asserts that config.sequence_parallel and "
    "layernorm_zero_centered_gamma are off; torch's norms take no input of another type.",
    delete_when="WrappedTorchNorm tags its parameters, and has zero_centered_gamma.",
    install=_install,
)
