"""Megatron-Bridge for tests: its own files where they are, else what we use of their interface.

Bridge 0.6.2 imports Transformer Engine at its top, so that a machine without GPU cannot import it.
With MEGATRON_BRIDGE_PATH (a folder that holds `megatron/bridge`, such as an unpacked wheel) the
provider's own file is taken without that top; recipes and configs need all of Bridge and are always
stand-ins.
"""

import dataclasses
import os
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def install() -> bool:
    """Put `megatron.bridge` into this process; whether the provider is Bridge's own."""
    folder = os.environ.get("MEGATRON_BRIDGE_PATH")
    for name in ("", ".models", ".training", ".recipes", ".recipes.gpt", ".utils"):
        module: Any = types.ModuleType(f"megatron.bridge{name}")
        package = Path(folder or "/nowhere", "megatron", "bridge", *name.split(".")[1:])
        module.__path__ = [str(package)] if folder else []
        sys.modules[module.__name__] = module
    if folder is None:
        _add("megatron.bridge.models.gpt_provider", GPTModelProvider=_provider())
    _add("megatron.bridge.recipes.gpt.vanilla_gpt", vanilla_gpt_pretrain_config=_vanilla_recipe)
    _add("megatron.bridge.training.config", OptimizerConfigOverrideProvider=_Overrides)
    _add("megatron.bridge.training.callbacks", Callback=type("Callback", (), {}))
    return folder is not None


def _add(name: str, **contents: Any) -> None:
    module: Any = types.ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module


class _Overrides:
    """As in megatron.bridge.training.config."""

    def build_config_overrides(self, context: Any) -> dict[str, Any] | None:
        return {"standard": context}


def _vanilla_recipe() -> SimpleNamespace:
    """The parts of a ConfigContainer that are set."""
    parts = ("dataset", "optimizer", "train", "scheduler")
    return SimpleNamespace(model=None, **{part: SimpleNamespace() for part in parts})


def _provider() -> type:
    """GPTModelProvider as documented: a TransformerConfig, finished late, that provides a GPT."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    def default_layer_spec(config: Any) -> Any:
        return get_gpt_layer_local_spec()

    @dataclass
    class GPTModelProvider(TransformerConfig):
        seq_length: int = 1024
        vocab_size: int | None = None
        position_embedding_type: str = "learned_absolute"
        share_embeddings_and_output_weights: bool = True
        transformer_layer_spec: Any = default_layer_spec
        _pg_collection: Any = None

        def __post_init__(self) -> None:
            """Left to `finalize`."""

        def finalize(self) -> None:
            TransformerConfig.__post_init__(self)

        def provide(self, pre_process=None, post_process=None, vp_stage=None) -> Any:
            spec = self.transformer_layer_spec(self, vp_stage=vp_stage)
            return GPTModel(
                self,
                spec,
                self.vocab_size,
                self.seq_length,
                pre_process,
                post_process,
                position_embedding_type=self.position_embedding_type,
                vp_stage=vp_stage,
                share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
                pg_collection=self._pg_collection,
            )

        def provide_distributed_model(self, **settings: Any) -> list[Any]:
            from megatron.core.distributed import DistributedDataParallel

            return [DistributedDataParallel(self, settings["ddp_config"], self.provide(True, True))]

    assert dataclasses.is_dataclass(GPTModelProvider)
    return GPTModelProvider
