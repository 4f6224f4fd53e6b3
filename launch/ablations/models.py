"""The models that the experiments compare, each at two scales.

Full: a preset of the paper, with changes. Small: the same switches with sizes that train in half a
minute on a CPU core. The transformer shrinks to 4 layers of width 96, the tables to 2.46 million
elements, 5.6 times the transformer's matrices; widths of experts and of the dense MLP are chosen
for equal FLOPs and (but for dense) equal parameters, which `sizes()` counts for the CSV.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from launch.small_models import Flags, text_gpt
from ultramem_megatron.presets import preset_fields
from ultramem_megatron.presets.flags import as_words

SMALL_TRANSFORMER: Flags = {
    **text_gpt(layers=4, hidden=96, heads=4, length=128),
    "ffn-hidden-size": 384,
}

SMALL_TRAINING: Flags = {
    "micro-batch-size": 8,
    "global-batch-size": 8,
    "lr": 3e-3,
    "min-lr": 3e-4,
    "lr-decay-style": "cosine",
    "lr-warmup-fraction": 0.1,
    "adam-beta2": 0.95,
    "weight-decay": 0.1,
    "clip-grad": 1.0,
}

# What a size of the 151M ablation presets becomes.
_SMALL_SIZES: Mapping[str, Mapping[str | int, str | int]] = {
    "spans": {"6:6": "2:2", "3:5/6:8/9:11": "1:2/3:4"},
    "num_keys": {1224: 160, 1728: 226, 1000: 160},
    "key_dim": {2448: 48, 500: 24, 501: 24},
    "value_dim": {1024: 96, 512: 48},
    "topk": {21: 8, 42: 16},
}

# 2 experts of 264 and an MLP of 527 use as many parameters of a token as UltraMem's layers.
_SMALL_MOE: Flags = {
    "num-experts": 14,
    "moe-router-topk": 2,
    "moe-ffn-hidden-size": 264,
    "moe-router-load-balancing-type": "aux_loss",
    "moe-aux-loss-coeff": 0.01,
}


@dataclass(frozen=True)
class Model:
    """One row or curve of an experiment."""

    name: str
    preset: str
    """Of the full scale."""
    small: Flags
    """Flags that are added to or replace those of the small transformer and training."""
    full: Flags = field(default_factory=dict)
    """Changes to the preset."""

    def small_arguments(self) -> list[str]:
        """Megatron's flags for the small model and its training, without data and schedule."""
        return as_words({**SMALL_TRANSFORMER, **SMALL_TRAINING, **self.small})


def dense(name: str = "dense", preset: str = "dense-151m") -> Model:
    """A plain GPT with as many FLOPs as the others."""
    return Model(name, preset, {"ffn-hidden-size": 527})


def moe(name: str = "moe", preset: str = "moe-151m-2in32") -> Model:
    """Megatron's mixture of experts in every layer, two for each token."""
    return Model(name, preset, _SMALL_MOE)


def ablation(name: str, preset: str, **changes: str | int | float) -> Model:
    """A row of the paper's ablations; changes: fields of UltraMemConfig, alike at both scales."""
    fields = {**preset_fields(preset), **changes}
    small = {key: _SMALL_SIZES.get(key, {}).get(value, value) for key, value in fields.items()}
    return Model(name, preset, _as_flags(small), _as_flags(changes))


def resized(name: str, preset: str, full: Mapping[str, int], small: Mapping[str, int]) -> Model:
    """The whole UltraMem layer with other sizes of its table and of what is read of it."""
    complete = ablation(name, ULTRAMEM_ROW).small
    return Model(name, preset, {**complete, **_as_flags(small)}, _as_flags(full))


def member(name: str, preset: str, ffn_hidden_size: int, **sizes: str | int) -> Model:
    """One of the family: its preset's switches with sizes of the small scale.

    The MLP's width is what leaves equal FLOPs, its table as many parameters as the others'.
    """
    small = _as_flags({**preset_fields(preset), **sizes})
    return Model(name, preset, {**small, "ffn-hidden-size": ffn_hidden_size})


def with_initial_std(model: Model, std: float) -> Model:
    """The same model, with all weights of its transformer started at one standard deviation."""
    flags = {"init-method-std": std, "embedding-init-method-std": std}
    return replace(model, small={**model.small, **flags}, full={**model.full, **flags})


def in_bfloat16(model: Model) -> Model:
    """The same model trained with --bf16."""
    return replace(model, small={**model.small, "bf16": True}, full={**model.full, "bf16": True})


ULTRAMEM_ROW = "ablation-151m-x10-query-conv"


def _as_flags(fields: Mapping[str, object]) -> Flags:
    flags: dict[str, str | int | float | bool] = {}
    for field_name, value in fields.items():
        flag = "ultramem-" + field_name.replace("_", "-")
        if value is False:
            flag, value = "no-" + flag, True
        assert isinstance(value, (str, int, float))
        flags[flag] = value
    return flags


@dataclass(frozen=True)
class Sizes:
    """Counted as the paper's tables count: matrices without embeddings, see plan/sizes.py."""

    dense_params: int
    sparse_params: int
    flops_per_token: int


@functools.cache
def sizes(model_name: str, arguments: tuple[str, ...]) -> Sizes:
    """Builds the model on the meta device and counts; `model_name` is for the cache alone."""
    from ultramem_megatron.tools.plan.build import command_line, parse
    from ultramem_megatron.tools.plan.sizes import model_sizes

    steps = ("--train-iters", "1")
    counted = model_sizes(parse(command_line(None, (*arguments, *steps))))
    return Sizes(counted.dense, counted.sparse, counted.flops_per_token)
