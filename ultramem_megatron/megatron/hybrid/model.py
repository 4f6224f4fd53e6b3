"""The model config and builder of a HybridModel with memory layers."""

import copy
from dataclasses import dataclass
from typing import Any

from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig

from ultramem_megatron.megatron.hybrid.local_stack import local_stack_spec
from ultramem_megatron.megatron.hybrid.specs import stack_with_memory
from ultramem_megatron.megatron.model import MemoryModelBuilder, MemorySettings


@dataclass(kw_only=True)
class UltraMemHybridModelConfig(MemorySettings, HybridModelConfig):
    """Megatron's HybridModelConfig and the design of its memory layers (None: a plain model).

    Its transformer config has the pattern kept (pattern.py).
    """

    builder = "ultramem_megatron.megatron.hybrid.model.UltraMemHybridModelBuilder"


class UltraMemHybridModelBuilder(MemoryModelBuilder, HybridModelBuilder):
    """Builds HybridModels with memory layers; for --transformer-impl local of Megatron's own."""

    def __init__(self, model_config: UltraMemHybridModelConfig) -> None:
        super().__init__(copy.copy(model_config))
        self._stack = _without_memory(model_config)

    def build_model(self, *args: Any, **kwargs: Any) -> Any:
        """One chunk, as HybridModelBuilder."""
        config = self._model_config
        config.hybrid_stack_spec = self._stack
        if config.ultramem is not None:
            config.hybrid_stack_spec = stack_with_memory(
                self._stack,
                config.ultramem,
                config.transformer,
                config.table_partition,
                config.table_node_size,
                overlap=config.memory_overlap,
            )
        return super().build_model(*args, **kwargs)


def _without_memory(config: UltraMemHybridModelConfig) -> ModuleSpec:
    """The stack's spec: the user's (--spec), else the one for the chosen implementation.

    The published one is all of Transformer Engine, so that it stands for the local one without.
    """
    given = config.hybrid_stack_spec
    is_published = given is None or given is hybrid_stack_spec
    if is_published and config.transformer.transformer_impl == "local":
        return local_stack_spec(config.transformer)
    return hybrid_stack_spec if given is None else given
