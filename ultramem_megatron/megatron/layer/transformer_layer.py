"""A Megatron transformer layer with a memory branch, or one that a memory's result passes through.

The memory reads the output of layer a's pre-MLP norm, the very tensor its MLP reads, and its result
joins the residual stream after layer b (paper section 2.3). In between it travels as `context`,
the second tensor that TransformerBlock hands from layer to layer and through recomputation; a
decoder-only GPT leaves it free. Between pipeline stages only one tensor is sent, so there it
travels beside the hidden states, in a tensor twice as wide (see pipeline/carrier.py).

S sequence, B batch, D hidden.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ultramem_megatron.communication.branch import Branch
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.layer.memory_submodule import Surroundings, TransformerMemory
from ultramem_megatron.memory.spans import Span
from ultramem_megatron.patches.doors.megatron_fsdp_parts import WHOLE


@dataclass
class UltraMemTransformerLayerSubmodules(TransformerLayerSubmodules):
    """Megatron's submodules and one more.

    memory: spec of the memory that reads in this layer; None where a span only passes or ends.
    """

    memory: ModuleSpec | None = None


class BranchUnderWay:
    """Hands a branch from layer to layer where a model's stack hands on tensors alone.

    One for each span. The layers that it runs beside follow each other in one process, in forward
    and in what is computed again, so that nothing comes in between.
    """

    def __init__(self) -> None:
        self._branch: Branch | None = None

    def put(self, branch: Branch) -> None:
        """For the next layer."""
        self._branch = branch

    def take(self) -> Branch | None:
        """What the layer before has put, if it has."""
        branch, self._branch = self._branch, None
        return branch


@dataclass(frozen=True)
class LayerRole:
    """What a layer has to do with pending results.

    span: the span that covers the layer, if any. unpacks, packs: it takes or hands on the wider
    tensor, hidden states and result side by side: as the first or last of a pipeline stage where
    results cross stages, and within a HybridModel's spans.
    branch_end: the memory computes beside the layers up to this one (see branch.py); None: it is
    done before the next layer starts. under_way: where the branch goes from layer to layer; None:
    with the context.
    """

    span: Span | None = None
    unpacks: bool = False
    packs: bool = False
    branch_end: int | None = None
    under_way: BranchUnderWay | None = None

    def beside_branch(self, layer_number: int) -> bool:
        """Whether the memory of the span, read in an earlier layer, still computes beside it."""
        if self.span is None or self.branch_end is None:
            return False
        return self.span.start < layer_number <= self.branch_end

    def ends_at(self, layer_number: int) -> bool:
        """Whether the result of the span is added after this layer."""
        return self.span is not None and layer_number == self.span.end

    def unpack(self, received: Tensor, layer_number: int) -> tuple[Tensor, Tensor | None]:
        """Hidden states and pending result of (S, B, 2D); None where no span covers the two."""
        hidden_states, pending = received.chunk(2, dim=-1)
        crosses = self.span is not None and self.span.start < layer_number
        return hidden_states.contiguous(), pending.contiguous() if crosses else None

    @staticmethod
    def pack(output: Tensor, pending: Tensor | None) -> Tensor:
        """The two side by side; nothing pending: zeros."""
        return torch.cat([output, torch.zeros_like(output) if pending is None else pending], -1)


class MemoryLayerMixin:
    """Adds the memory to a TransformerLayer class; see `with_memory_branch`."""

    config: TransformerConfig
    training: bool
    layer_number: int
    self_attention: nn.Module
    pre_mlp_layernorm: nn.Module
    mlp_bda: Callable[..., Any]
    pg_collection: ProcessGroupCollection

    def __init__(
        self,
        config: TransformerConfig,
        submodules: UltraMemTransformerLayerSubmodules,
        *args: Any,
        role: LayerRole,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)  # type: ignore[call-arg]  # TransformerLayer's, a mixin's next
        self.role = role
        self.memory: TransformerMemory | None = None
        self._memory_input: Tensor | None = None
        self._branch: Branch | None = None
        if role.beside_branch(self.layer_number):
            self.self_attention.register_forward_hook(self._after_attention)
        if submodules.memory is None:
            return
        self.memory = build_module(
            submodules.memory,
            config=self.config,
            layer_number=self.layer_number,
            pg_collection=self.pg_collection,
        )
        if role.branch_end is not None:
            self.memory.add_gradients_beside()
            setattr(self.memory, WHOLE, True)
        norm = self.pre_mlp_layernorm
        if isinstance(norm, IdentityOp):
            raise UltraMemError(
                f"Layer {self.layer_number} fuses its pre-MLP norm into the MLP, so the memory has "
                f"no tensor to read. Build the spec with with_memory of "
                f"ultramem_megatron.megatron.layer.specs."
            )
        norm.register_forward_hook(self._keep_memory_input)
        # Selective recomputation would free the norm's output after the MLP, while the memory
        # still needs it in its backward.
        self.recompute_pre_mlp_layernorm = False
        if self.memory.config.replace_mlp:  # the layer passes on what it had; _add comes later
            self._add, self.mlp_bda = self.mlp_bda, _pass_residual
            self.recompute_mlp = False

    def create_mcore_cudagraph_manager(self, config: TransformerConfig) -> None:
        """Let CUDA graphs hold Megatron's layer alone: memories and pending results stay beside it.

        Called by Megatron's constructor with --cuda-graph-impl local. Where it would capture the
        layer's `forward`, `_layer_alone` is captured.
        """
        from megatron.core.transformer import cuda_graphs

        super().create_mcore_cudagraph_manager(config)  # type: ignore[misc]  # TransformerLayer's, too
        if hasattr(self, "cudagraph_manager"):
            del self.cudagraph_manager
            self.layer_graphs = cuda_graphs.CudaGraphManager(config, self, "_layer_alone")

    def _layer_alone(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Output of Megatron's layer, and what its memory is to read: all that a graph holds."""
        output, _ = super().forward(*args, context=None, **kwargs)  # type: ignore[misc]  # TransformerLayer's, too
        memory_input, self._memory_input = self._memory_input, None
        return output, memory_input

    def _keep_memory_input(self, _norm: nn.Module, _inputs: object, output: Any) -> None:
        # Norms with a fused residual return (output, residual).
        self._memory_input = output[0] if isinstance(output, tuple) else output

    def _after_attention(self, *_: object) -> None:
        if self._branch is not None:
            self._branch.go_on()

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        context: Tensor | Branch | None = None,
        **kwargs: Any,
    ) -> Any:
        """As TransformerLayer.forward; `context` is the pending result of the current span.

        hidden_states: (S, B, D), or (S, B, 2D) where this layer unpacks. context: (S, B, D), a
        branch that will have it, or None. Returns the hidden states (S, B, 2D if it packs) and the
        context for the next layer.
        """
        if self.role.unpacks:
            hidden_states, context = self.role.unpack(hidden_states, self.layer_number)
        if self.role.under_way is not None:
            context = self.role.under_way.take() or context
        self._branch = context if isinstance(context, Branch) else None
        layer = self._layer_alone
        if kwargs.get("inference_context") is not None or torch.is_inference_mode_enabled():
            layer = functools.partial(MemoryLayerMixin._layer_alone, self)  # not from its graph
        output, memory_input = layer(hidden_states, *args, **kwargs)
        if self.memory is not None:
            mask = args[0] if args else kwargs.get("attention_mask")
            context = self._read_memory(memory_input, mask, kwargs)
        elif self._branch is not None:
            context, self._branch = self._end_of_layer(self._branch), None
        if self.role.ends_at(self.layer_number):
            output, context = self._added(output, context), None
        if self.role.under_way is not None and isinstance(context, Branch):
            self.role.under_way.put(context)
            context = None
        if self.role.packs:
            assert not isinstance(context, Branch), "a branch ends with its pipeline stage"
            output, context = self.role.pack(output, context), None
        return output, context

    def _added(self, output: Tensor, result: Tensor | Branch | None) -> Tensor:
        """With the result of a span; in place of an MLP's, under dropout as that would be."""
        assert isinstance(result, Tensor), "a branch ends within its span"
        if self.memory is None or not self.memory.config.replace_mlp:
            return output + result
        add = self._add(self.training, self.config.bias_dropout_fusion)
        added: Tensor = add((result, None), output, self.config.hidden_dropout)
        return added

    def _end_of_layer(self, branch: Branch) -> Tensor | Branch:
        if self.layer_number == self.role.branch_end:
            return branch.join()
        branch.go_on()
        return branch

    def _read_memory(
        self, memory_input: Tensor | None, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor | Branch:
        assert self.memory is not None
        assert memory_input is not None, "the pre-MLP norm did not run"
        if isinstance(self.memory, FSDPModule):  # a unit of its own, which only a call would gather
            self.memory.unshard()
        if self.training:
            # Once per optimizer step would do; with unchanged cores repeating it changes nothing.
            self.memory.after_step()
        surroundings = Surroundings(
            kwargs.get("inference_context"), kwargs.get("packed_seq_params"), mask
        )
        inputs = memory_input, surroundings
        if self.role.branch_end is None:
            return self.memory(*inputs)
        return self.memory.branch(*inputs, layers=self.role.branch_end - self.layer_number)


def _pass_residual(_training: bool, _fused: bool) -> Callable[..., Tensor]:
    """As a layer's `mlp_bda`: an MLP that adds nothing."""
    return lambda _output_and_bias, residual, _dropout: residual


@functools.cache
def with_memory_branch(base: type[TransformerLayer]) -> type[TransformerLayer]:
    """The subclass of a TransformerLayer class that reads, carries or adds a memory's result."""
    return type(f"UltraMem{base.__name__}", (MemoryLayerMixin, base), {"__module__": __name__})


UltraMemTransformerLayer = with_memory_branch(TransformerLayer)
