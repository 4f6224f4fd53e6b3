"""The model config and builder that Megatron's `pretrain()` takes: a GPT with memory layers."""

import copy
import inspect
from dataclasses import dataclass
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.training import print_rank_0
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig, default_layer_spec

from ultramem_megatron.auxiliary_loss import finalize_with_auxiliary_loss, memory_layers
from ultramem_megatron.config import UltraMemConfig
from ultramem_megatron.current_run import current_run
from ultramem_megatron.metrics import MemoryMonitor
from ultramem_megatron.pipeline_layout import most_on_one_stage
from ultramem_megatron.size import memory_size
from ultramem_megatron.specs import with_memory


@dataclass(kw_only=True)
class UltraMemGPTModelConfig(GPTModelConfig):
    """Megatron's GPTModelConfig and the design of its memory layers (None: a plain GPT)."""

    builder = "ultramem_megatron.model.UltraMemGPTModelBuilder"
    ultramem: UltraMemConfig | None = None


def ultramem_layer_spec(
    config: UltraMemGPTModelConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layer spec Megatron would use for `config`, with memories; a `transformer_layer_spec`."""
    assert config.ultramem is not None
    return with_memory(
        default_layer_spec(config, vp_stage), config.ultramem, config.transformer, vp_stage
    )


class UltraMemGPTModelBuilder(GPTModelBuilder):
    """Builds GPT models with memory layers; without `ultramem` it is Megatron's own builder."""

    def __init__(self, model_config: UltraMemGPTModelConfig) -> None:
        if model_config.ultramem is not None:
            model_config = copy.copy(model_config)
            model_config.transformer_layer_spec = _spec_with_memory(model_config)
            transformer = model_config.transformer
            # Layers with and without memory differ, so checkpoint keys must name the layer.
            transformer.hetereogenous_dist_checkpoint = True
            if transformer.finalize_model_grads_func is None:
                transformer.finalize_model_grads_func = finalize_with_auxiliary_loss
        super().__init__(model_config)

    def build_distributed_models(
        self, pg_collection: ProcessGroupCollection, *args: Any, **kwargs: Any
    ) -> list[Any]:
        """All chunks of this rank, as GPTModelBuilder; also starts the memory layers' metrics."""
        models = super().build_distributed_models(pg_collection, *args, **kwargs)
        config = self._model_config
        current_run.ultramem = config.ultramem
        current_run.hidden_size = config.transformer.hidden_size
        current_run.monitor = current_run.scheduler = None
        if config.ultramem is not None:
            current_run.memories_on_fullest_stage = most_on_one_stage(
                config.ultramem.spans, config.transformer
            )
            layers = [layer for model in models for layer in memory_layers(model)]
            current_run.monitor = MemoryMonitor(
                {layer.layer_number: layer for layer in layers},
                config.ultramem.spans,
                data_group=pg_collection.dp_cp,
                pipeline_group=pg_collection.pp,
            )
            print_rank_0(plan(config.ultramem, config.transformer.hidden_size))
        return models


def plan(ultramem: UltraMemConfig, hidden_size: int) -> str:
    """The memory layers in one line: places, sizes, parameters, FLOPs."""
    size = memory_size(ultramem, hidden_size)
    spans = "/".join(map(str, ultramem.spans))
    return (
        f" > UltraMem: {len(ultramem.spans)} memory layers at spans {spans}, "
        f"{ultramem.num_values} values x {ultramem.value_dim} each; parameters: "
        f"{size.sparse} sparse (value tables), {size.dense} dense; "
        f"{size.flops_per_token} FLOPs per token forward"
    )


def _spec_with_memory(config: UltraMemGPTModelConfig) -> Any:
    """A spec function that adds memories to the user's spec, or to Megatron's default."""
    given = config.transformer_layer_spec
    ultramem = config.ultramem
    assert ultramem is not None

    def spec(model_config: GPTModelConfig, vp_stage: int | None = None) -> Any:
        base = _resolve(given, model_config, vp_stage)
        return with_memory(base, ultramem, model_config.transformer, vp_stage)

    return spec


def _resolve(given: Any, config: GPTModelConfig, vp_stage: int | None) -> Any:
    """The layer spec without memory, chosen as GPTModelBuilder does."""
    if given is None:
        spec = default_layer_spec(config, vp_stage)  # type: ignore[arg-type]
    elif isinstance(given, ModuleSpec) or not callable(given):
        spec = given
    elif "vp_stage" in inspect.signature(given).parameters:
        spec = given(config, vp_stage=vp_stage)
    else:
        spec = given(config)
    if config.attention_backend == AttnBackend.local and hasattr(spec, "submodules"):
        spec = copy.deepcopy(spec)
        spec.submodules.self_attention.submodules.core_attention = DotProductAttention
    return spec
