"""A Megatron transformer layer with a memory branch, or one that a memory's result passes through.

The memory reads the output of layer a's pre-MLP norm, the very tensor its MLP reads, and its result
joins the residual stream after layer b (paper section 2.3). In between it travels as `context`,
the second tensor that TransformerBlock hands from layer to layer and through recomputation; a
decoder-only GPT leaves it free.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor, nn

from ultramem_megatron.config import UltraMemConfig
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.layer import UltraMemLayer
from ultramem_megatron.spans import Span


@dataclass
class UltraMemTransformerLayerSubmodules(TransformerLayerSubmodules):
    """Megatron's submodules and one more.

    memory: spec of the memory that reads in this layer; None where a span only passes or ends.
    """

    memory: ModuleSpec | None = None


class TransformerMemory(UltraMemLayer):
    """An UltraMemLayer built as Megatron builds submodules, with a cache for decoding."""

    def __init__(
        self, config: TransformerConfig, *, ultramem: UltraMemConfig, layer_number: int
    ) -> None:
        """config: sizes, norm epsilon, parameter dtype and device are taken from it."""
        with _parameter_dtype(config.params_dtype), _parameter_device(config):
            super().__init__(
                ultramem,
                hidden_size=config.hidden_size,
                num_layers=config.num_layers,
                layer_number=layer_number,
                eps=config.layernorm_epsilon,
            )

    def forward(  # type: ignore[override]
        self, x: Tensor, inference_context: Any = None, packed_seq_params: Any = None
    ) -> Tensor:
        """x: (S, B, D), the output of the pre-MLP norm; returns the same shape and dtype."""
        if self.query.conv is None:
            return super().forward(x)
        if packed_seq_params is not None:
            raise UltraMemError(
                f"--ultramem-query-conv-kernel {self.config.query_conv_kernel} would mix packed "
                f"documents; it must be 0 with packed sequences."
            )
        if inference_context is None:
            return super().forward(x)
        return super().forward(x, self._decoding_history(x, inference_context))

    def _decoding_history(self, x: Tensor, inference_context: Any) -> Tensor | None:
        """Inputs before x that the convolution sees; kept in the context, like keys and values."""
        if not inference_context.is_static_batching():
            raise UltraMemError(
                f"--ultramem-query-conv-kernel {self.config.query_conv_kernel} needs static "
                f"batching for inference; it must be 0 with dynamic batching."
            )
        caches = inference_context.__dict__.setdefault("ultramem_query_history", {})
        slot = (self.layer_number, inference_context.batch_size_offset)
        history = caches.get(slot) if inference_context.sequence_len_offset else None
        length = self.config.query_conv_kernel - 1
        before = x.new_zeros(length, *x.shape[1:]) if history is None else history
        caches[slot] = torch.cat([before, x])[len(x) :].detach()
        return history


class MemoryLayerMixin:
    """Adds the memory to a TransformerLayer class; see `with_memory_branch`."""

    config: TransformerConfig
    training: bool
    layer_number: int

    def __init__(
        self,
        config: TransformerConfig,
        submodules: UltraMemTransformerLayerSubmodules,
        *args: Any,
        span: Span,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)  # type: ignore[call-arg]
        self.span = span
        self.memory: TransformerMemory | None = None
        self._memory_input: Tensor | None = None
        if submodules.memory is None:
            return
        self.memory = build_module(
            submodules.memory, config=self.config, layer_number=self.layer_number
        )
        norm: nn.Module = self.pre_mlp_layernorm  # type: ignore[attr-defined]
        if isinstance(norm, IdentityOp):
            raise UltraMemError(
                f"Layer {self.layer_number} fuses its pre-MLP norm into the MLP, so the memory has "
                f"no tensor to read. Build the spec with ultramem_megatron.specs.with_memory."
            )
        norm.register_forward_hook(self._keep_memory_input)
        # Selective recomputation would free the norm's output after the MLP, while the memory
        # still needs it in its backward.
        self.recompute_pre_mlp_layernorm = False

    def _keep_memory_input(self, _norm: nn.Module, _inputs: object, output: Any) -> None:
        # Norms with a fused residual return (output, residual).
        self._memory_input = output[0] if isinstance(output, tuple) else output

    def forward(self, *args: Any, context: Tensor | None = None, **kwargs: Any) -> Any:
        """As TransformerLayer.forward; `context` is the pending result of the current span.

        context: (S, B, D) or None. Returns the hidden states and the context for the next layer.
        """
        output, _ = super().forward(*args, context=None, **kwargs)  # type: ignore[misc]
        if self.memory is not None:
            context = self._read_memory(kwargs)
        if self.layer_number == self.span.end:
            output, context = output + context, None
        return output, context

    def _read_memory(self, kwargs: dict[str, Any]) -> Tensor:
        assert self.memory is not None
        memory_input, self._memory_input = self._memory_input, None
        assert memory_input is not None, "the pre-MLP norm did not run"
        if self.training:
            # Once per optimizer step would do; with unchanged cores repeating it changes nothing.
            self.memory.update_filter()
        return self.memory(
            memory_input, kwargs.get("inference_context"), kwargs.get("packed_seq_params")
        )


@functools.cache
def with_memory_branch(base: type[TransformerLayer]) -> type[TransformerLayer]:
    """The subclass of a TransformerLayer class that reads, carries or adds a memory's result."""
    return type(f"UltraMem{base.__name__}", (MemoryLayerMixin, base), {"__module__": __name__})


UltraMemTransformerLayer = with_memory_branch(TransformerLayer)


def _parameter_device(config: TransformerConfig) -> torch.device:
    if config.init_model_with_meta_device:
        return torch.device("meta")
    if config.use_cpu_initialization:
        return torch.device("cpu")
    return torch.device(torch.cuda.current_device())


class _parameter_dtype:  # noqa: N801 - used as a context manager
    """Make torch create floating parameters in `dtype` for a while."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.before = dtype, torch.get_default_dtype()

    def __enter__(self) -> None:
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)
