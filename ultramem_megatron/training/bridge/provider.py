"""Megatron-Bridge's GPT provider with memory layers.

    from ultramem_megatron.training.bridge.provider import UltraMemGPTModelProvider
    cfg.model = UltraMemGPTModelProvider(num_layers=12, ..., ultramem=UltraMemConfig(...))

Written against Megatron-Bridge 0.6.2. Bridge also takes megatron.training's model configs, so
`UltraMemGPTModelConfig` (ultramem_megatron/megatron/model.py) can be `cfg.model` too, and is what
Bridge's deprecation of providers leads to; its builder's hook for the auxiliary loss is overwritten
there.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.flags.refusals import refuse_unsupported_settings
from ultramem_megatron.megatron.layer.specs import with_memory
from ultramem_megatron.megatron.optimizer.auxiliary_loss import finalize_then_auxiliary_loss
from ultramem_megatron.megatron.pipeline.carrier import widen_pipeline_tensors
from ultramem_megatron.megatron.pipeline.layout import spans_cross_stages
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.validation import validate

try:
    from megatron.bridge.models.gpt_provider import GPTModelProvider
except ImportError as error:
    raise UltraMemError(
        f"Megatron-Bridge cannot be imported ({error}). Install megatron-bridge with Transformer "
        f"Engine, or train with ultramem train, which needs neither."
    ) from error


@dataclass
class UltraMemGPTModelProvider(GPTModelProvider):
    """Bridge's GPTModelProvider and the design of its memory layers (None: a plain GPT).

    Tables lie over Megatron's expert-parallel group. Bridge makes groups from the flags of the
    model, and an expert-parallel size above 1 there means experts: without them every rank has
    whole tables. memory_overlap: memories compute beside the layers of their spans.

    Raises UltraMemError, from `finalize` or when built, for what memories cannot be combined with.
    """

    ultramem: UltraMemConfig | None = None
    table_partition: str = "dimension"
    memory_overlap: bool = False

    def finalize(self) -> None:
        """Check the design, then everything else as GPTModelProvider does."""
        if self.ultramem is not None:
            validate(self.ultramem, hidden_size=self.hidden_size, num_layers=self.num_layers)
            # Layers with and without memory differ, so checkpoint keys must name the layer.
            self.hetereogenous_dist_checkpoint = True
            refuse_unsupported_settings(vars(self))
        super().finalize()

    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> Any:
        """The GPTModel of this pipeline stage, with memories."""
        if self.ultramem is None:
            return super().provide(pre_process, post_process, vp_stage)
        given: Any = vars(self)["transformer_layer_spec"]
        self.transformer_layer_spec = functools.partial(_spec_with_memory, given)
        try:
            return super().provide(pre_process, post_process, vp_stage)
        finally:
            self.transformer_layer_spec = given

    def provide_distributed_model(self, *args: Any, **kwargs: Any) -> list[Any]:
        """All chunks of this rank in their wrappers."""
        if self.ultramem is None:
            return list(super().provide_distributed_model(*args, **kwargs))
        refuse_unsupported_settings(kwargs)
        models: list[Any] = super().provide_distributed_model(*args, **kwargs)
        if spans_cross_stages(self.ultramem.spans, self):
            widen_pipeline_tensors(models)
        return models


def _spec_with_memory(
    given: ModuleSpec | Callable[..., Any],
    config: UltraMemGPTModelProvider,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """The provider's own spec with memories; called as Bridge calls spec functions."""
    assert config.ultramem is not None
    spec: Any = given
    if not isinstance(given, ModuleSpec):
        takes_stage = "vp_stage" in inspect.signature(given).parameters
        spec = given(config, vp_stage=vp_stage) if takes_stage else given(config)
    return with_memory(
        spec,
        config.ultramem,
        config,
        vp_stage,
        config._pg_collection.pp.rank(),
        partition=config.table_partition,
        overlap=config.memory_overlap,
    )


def _get_finalize(self: UltraMemGPTModelProvider) -> Callable[..., None] | None:
    return self.__dict__.get("_finalize_with_auxiliary_loss")


def _set_finalize(self: UltraMemGPTModelProvider, finalize: Callable[..., None] | None) -> None:
    if finalize is not None:
        finalize = functools.partial(finalize_then_auxiliary_loss, finalize)
    self.__dict__["_finalize_with_auxiliary_loss"] = finalize


# Bridge sets this field to Megatron's function once the optimizer is made: whatever it sets, the
# auxiliary loss follows.
UltraMemGPTModelProvider.finalize_model_grads_func = property(_get_finalize, _set_finalize)
