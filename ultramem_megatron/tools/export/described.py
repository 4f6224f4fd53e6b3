"""Whether a PlainConfig that was read from a file describes a model that can be built."""

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.pipeline.pattern import ATTENTION, EXPERTS, MAMBA, MLP
from ultramem_megatron.memory.typed_fields import wrong_fields
from ultramem_megatron.memory.validation import check_design
from ultramem_megatron.tools.export.plain_model import PlainConfig

_MOST = 2**31 - 1
_MOST_BUILT = 10_000
"""Layers, and experts of one: they are built before the weights say how many there are."""
_MAMBA_SIZES = ("mamba_num_heads", "mamba_head_dim", "mamba_num_groups", "mamba_state_dim")


def check_described(config: PlainConfig) -> None:
    """Raise UltraMemError, naming what is wrong."""
    for name, what in wrong_fields(config):
        raise UltraMemError(f"{name} is {getattr(config, name)!r:.80}; it must be {what}.")
    for name in ("vocab_size", "hidden_size", "ffn_hidden_size", "max_positions"):
        _check_size(config, name)
    _check_size(config, "num_layers", most=_MOST_BUILT)
    _check_pattern(config.pattern, config.num_layers)
    _check_parts(config)
    if config.norm_epsilon < 0:
        raise UltraMemError(f"norm_epsilon is {config.norm_epsilon:g}; it must be at least 0.")
    if config.ultramem is not None:
        sizes = {"hidden_size": config.hidden_size, "num_layers": config.num_layers}
        check_design(config.ultramem, **sizes)


def _check_parts(config: PlainConfig) -> None:
    kinds = set(config.pattern or config.parts(1))
    if ATTENTION in kinds:
        _check_attention(config)
    if EXPERTS in kinds:
        _check_experts(config)
    if MAMBA in kinds:
        for name in _MAMBA_SIZES:
            _check_size(config, name)
        _check_groups(config, "mamba_num_heads", "mamba_num_groups")


def _check_size(config: PlainConfig, name: str, least: int = 1, most: int = _MOST) -> None:
    value = getattr(config, name)
    if value is None or not least <= value <= most:
        raise UltraMemError(f"{name} is {value}; it must be a whole number from {least} to {most}.")


def _check_groups(config: PlainConfig, members: str, groups: str) -> None:
    if getattr(config, members) % getattr(config, groups):
        raise UltraMemError(
            f"{members} is {getattr(config, members)}, no multiple of {groups}, which is "
            f"{getattr(config, groups)}."
        )


def _check_pattern(pattern: str | None, num_layers: int) -> None:
    if pattern is None:
        return
    if len(pattern) != num_layers:
        raise UltraMemError(f"the pattern {pattern!r:.80} has not {num_layers} layers.")
    unknown = set(pattern) - {ATTENTION, EXPERTS, MAMBA, MLP}
    if unknown:
        raise UltraMemError(f"the pattern {pattern!r:.80} has {min(unknown)!r}, no kind of layer.")


def _check_attention(config: PlainConfig) -> None:
    for name in ("num_attention_heads", "num_query_groups", "kv_channels"):
        _check_size(config, name)
    _check_groups(config, "num_attention_heads", "num_query_groups")
    if config.rotary_base <= 0 or not 0 < config.rotary_percent <= 1:
        raise UltraMemError(
            f"rotary_base is {config.rotary_base:g} and rotary_percent {config.rotary_percent:g}; "
            f"they must be above 0, the second at most 1."
        )


def _check_experts(config: PlainConfig) -> None:
    _check_size(config, "num_experts", most=_MOST_BUILT)
    _check_size(config, "expert_topk", most=config.num_experts or 0)
    if config.expert_ffn_hidden_size is not None:
        _check_size(config, "expert_ffn_hidden_size")
