"""A Megatron-Bridge recipe for the paper's models.

    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain
    from ultramem_megatron.training.bridge.recipe import ultramem_pretrain_config, value_rate_fall

    cfg = ultramem_pretrain_config("ultramem-151m-x12")
    cfg.dataset.blend = (["my_data_text_document"], None)
    pretrain(cfg, forward_step, callbacks=[value_rate_fall(cfg.model.ultramem)])

Without the callback the tables' learning rate stays value_lr_mult times the base rate. What this
package's own pretrain has and Bridge's loop does not: the metrics of memory layers.
"""

from collections.abc import Mapping
from typing import Any

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.optimizer.value_learning_rate import (
    value_lr_factor,
    value_overrides,
)
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.spans import parse_spans
from ultramem_megatron.patches import registry
from ultramem_megatron.presets import find_preset
from ultramem_megatron.presets.preset import Settings, Value

_MODEL = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "normalization",
    "position_embedding_type",
    "seq_length",
)
_NEGATED = {
    "disable_bias_linear": "add_bias_linear",
    "untie_embeddings_and_output_weights": "share_embeddings_and_output_weights",
}
"""Flags that Bridge's provider has with the opposite meaning."""
_IMPLIED = {"max_position_embeddings"}
_OPTIMIZER = ("lr", "min_lr", "adam_beta1", "adam_beta2", "adam_eps", "weight_decay", "clip_grad")


def ultramem_pretrain_config(preset: str = "ultramem-151m-x12") -> Any:
    """A ConfigContainer: Bridge's plain GPT recipe with the model and training of a preset.

    preset: of `ultramem presets` with memory layers. Raises UltraMemError for
    another one. Layout, data, tokenizer and folders are the caller's to set.
    """
    from megatron.bridge.recipes.gpt.vanilla_gpt import vanilla_gpt_pretrain_config

    found = find_preset(preset)
    if not found.memory:
        raise UltraMemError(f"{preset} has no memory layers; use Bridge's own recipes for it.")
    registry.apply_all()  # and no more: the process is Bridge's to open
    cfg = vanilla_gpt_pretrain_config()
    training = _values(found.training)
    cfg.model = provider_of(found.model, found.memory, training)
    cfg.dataset.seq_length = cfg.model.seq_length
    for name in _OPTIMIZER:
        setattr(cfg.optimizer, name, training[name])
    cfg.train.train_iters = training["train_iters"]
    cfg.train.global_batch_size = training["global_batch_size"]
    cfg.scheduler.lr_decay_style = training["lr_decay_style"]
    cfg.scheduler.lr_warmup_iters = 0
    cfg.scheduler.lr_warmup_fraction = training["lr_warmup_fraction"]
    cfg.scheduler.start_weight_decay = training["weight_decay"]
    cfg.scheduler.end_weight_decay = training["weight_decay"]
    cfg.optimizer_config_override_provider = _value_overrides(cfg.model.ultramem)
    return cfg


def provider_of(model: Settings, memory: Settings, training: Mapping[str, Value]) -> Any:
    """The UltraMemGPTModelProvider of a preset's settings."""
    from ultramem_megatron.training.bridge.provider import UltraMemGPTModelProvider

    flags = _values(model)
    unknown = flags.keys() - {*_MODEL, *_NEGATED, *_IMPLIED}
    assert not unknown, f"no field of Bridge's provider is known for {sorted(unknown)}"
    fields: dict[str, Any] = {name: flags[name] for name in _MODEL if name in flags}
    fields |= {field: not flags.get(flag, False) for flag, field in _NEGATED.items()}
    design = _values(memory)
    spans = parse_spans(str(design.pop("spans")), int(fields["num_layers"]))
    return UltraMemGPTModelProvider(
        **fields,
        attention_dropout=float(training["attention_dropout"]),
        hidden_dropout=float(training["hidden_dropout"]),
        bf16=bool(training["bf16"]),
        ultramem=UltraMemConfig(spans=spans, **design),  # type: ignore[arg-type]  # values of a preset
    )


def _values(settings: Settings) -> dict[str, Value]:
    return {name: setting.value for name, setting in settings.items()}


def _value_overrides(ultramem: UltraMemConfig) -> Any:
    """Bridge's optimizer overrides and the tables' own learning rate.

    Megatron's scheduler knows no lr_mult, but a highest and a lowest rate of a group.
    """
    from megatron.bridge.training.config import OptimizerConfigOverrideProvider

    class ValueLearningRate(OptimizerConfigOverrideProvider):
        """The tables in a parameter group of their own."""

        def build_config_overrides(self, context: Any) -> dict[Any, Any] | None:
            overrides = super().build_config_overrides(context) or {}
            optimizer = context.optimizer_config
            for key, override in value_overrides(ultramem).items():
                times, fixed = override.get("lr_mult", 1.0), ultramem.value_lr_fixed
                rates = {
                    "max_lr": fixed or times * optimizer.lr,
                    "min_lr": fixed or times * (optimizer.min_lr or 0),
                }
                overrides = {**overrides, key: {**override, **rates}}
            return overrides or None

    return ValueLearningRate()


def value_rate_fall(ultramem: UltraMemConfig) -> Any:
    """A callback for Bridge's pretrain: the tables' learning rate falls as value_lr_decay says."""
    from megatron.bridge.training.callbacks import Callback

    class ValueRateFall(Callback):
        """Before each step, from the rate that the scheduler gives the tables."""

        def on_train_step_start(self, context: Any) -> None:
            scheduler = context.scheduler
            progress = scheduler.num_steps / scheduler.wd_incr_steps
            for group in context.optimizer.param_groups:
                start = group.get("lr_mult", 1.0)
                if start == 0.0:
                    group["lr"] = ultramem.value_lr_fixed
                elif start != 1.0:
                    factor = value_lr_factor(start, progress, ultramem.value_lr_decay)
                    group["lr"] = scheduler.get_lr(group) * factor / start

    return ValueRateFall()
