"""Whether a config describes a memory layer that can be built in a given model."""

import math
from typing import get_args

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.config import (
    Activation,
    Norm,
    RankLayout,
    ShareOrder,
    UltraMemConfig,
    flag,
)
from ultramem_megatron.memory.initialization import INITIALISATIONS
from ultramem_megatron.memory.retrieval import RETRIEVALS
from ultramem_megatron.memory.sharing import check_sharing
from ultramem_megatron.memory.spans import check_spans
from ultramem_megatron.memory.typed_fields import wrong_fields
from ultramem_megatron.memory.values import VALUES

CHOICES: dict[str, tuple[str, ...]] = {
    "retrieval": tuple(RETRIEVALS),
    "rank_layout": get_args(RankLayout),
    "qk_norm": get_args(Norm),
    "values": tuple(VALUES),
    "pre_value_activation": get_args(Activation),
    "share_order": get_args(ShareOrder),
    "init": tuple(INITIALISATIONS),
    "table_moments": ("float32", "factored", "bfloat16", "int8"),
    "table_main_params": ("float32", "none"),
}
"""Fields of the config that take one of a few words."""

_NUMBERS = {
    "aux_loss_weight": (0, 1e4, "a number (0: no penalty)"),
    "aux_loss_margin": (0, 1e4, "a number"),
    "value_lr_mult": (1e-4, 1e4, "a number (1: the base rate)"),
    "value_lr_fixed": (0, 1, "a learning rate (0: none)"),
    "value_wd_mult": (0, 1e4, "a number (0: no decay, 1: as matrices)"),
    "value_lr_decay": (1e-6, 1, "a fraction of training"),
}
"""Far beyond what anybody trained with; a loss, a rate or a step within them stays finite."""

_MOST = 2**31 - 1
_MOST_TAPS = 1024
"""Each is read on its own; the authors have 5."""


def validate(config: UltraMemConfig, *, hidden_size: int, num_layers: int) -> None:
    """Raise UltraMemError, naming flag, value, what is allowed and what to change."""
    check_design(config, hidden_size=hidden_size, num_layers=num_layers)
    check_alive(config)
    if config.share_query and config.heads > 1 and config.heads % 2:
        raise UltraMemError(
            f"{flag('heads')} is {config.heads}; with a query shared by two heads it must be 1 or "
            f"even. Use {config.heads + 1}, or --no-ultramem-share-query."
        )


def check_design(config: UltraMemConfig, *, hidden_size: int, num_layers: int) -> None:
    """As `validate`, of what can be computed: with weights that others have trained.

    Their layers may have an odd number of heads, the last with a query alone.
    """
    for field, what in wrong_fields(config):
        _require(False, field, f"{getattr(config, field)!r:.80}", what)
    _check_ranges(config)
    check_spans(config.spans, num_layers)
    _check_replacing(config)
    _check_expansion(config.value_expansion)
    _check_key_expansion(config)
    check_sharing(config)
    _check_heads(config)
    RETRIEVALS[config.retrieval].check(config)
    _check_values(config, hidden_size)


def _check_ranges(config: UltraMemConfig) -> None:
    for field in ("num_keys", "key_dim", "value_dim", "topk", "heads", "tucker_rank", "cores"):
        _require_whole(config, field, 1)
    for field in ("side_topk", "pre_value_dim"):
        _require_whole(config, field, 0)
    _require_whole(config, "query_conv_kernel", 0, _MOST_TAPS, " (0: no convolution)")
    for field, (least, most, what) in _NUMBERS.items():
        value = getattr(config, field)
        _require(least <= value <= most, field, value, f"{what}, from {least:g} to {most:g}")
    for field, allowed in CHOICES.items():
        _require(
            getattr(config, field) in allowed,
            field,
            getattr(config, field),
            "one of " + ", ".join(allowed),
        )


def _require_whole(
    config: UltraMemConfig, field: str, least: int, most: int = _MOST, note: str = ""
) -> None:
    value = getattr(config, field)
    _require(value >= least, field, value, f"a whole number >= {least}{note}")
    _require(value <= most, field, value, f"a whole number <= {most}")


def _require(holds: bool, field: str, value: object, allowed: str) -> None:
    if not holds:
        raise UltraMemError(f"{flag(field)} is {value}; it must be {allowed}.")


def _check_replacing(config: UltraMemConfig) -> None:
    longer = [span for span in config.spans if span.start < span.end]
    if config.replace_mlp and longer:
        raise UltraMemError(
            f"{flag('spans')} {longer[0]} with {flag('replace_mlp')}: a memory in place of a "
            f"layer's MLP adds its result in the layer that it reads. Use "
            f"{longer[0].start}:{longer[0].start}, or drop {flag('replace_mlp')}."
        )


def _check_key_expansion(config: UltraMemConfig) -> None:
    root, given = math.isqrt(config.value_expansion), config.key_expansion
    if given != root and (config.value_expansion != 1 or given is None or given < 1):
        raise UltraMemError(
            f"{flag('key_expansion')} is {given}; with {flag('value_expansion')} "
            f"{config.value_expansion} it must be {root}, its root. Leave it out, or use "
            f"{flag('value_expansion')} 1, which adds up what the addresses of a value bring."
        )


def _check_expansion(expansion: int) -> None:
    root = math.isqrt(max(expansion, 0))
    if expansion < 1 or root * root != expansion:
        below, above = max(root, 1) ** 2, (max(root, 1) + 1) ** 2
        raise UltraMemError(
            f"{flag('value_expansion')} is {expansion}; it must be a square (1, 4, 9, 16, ...), "
            f"because each side of the key grid grows by its root. Use {below} or {above}."
        )


def _check_heads(config: UltraMemConfig) -> None:
    if config.shortlist > config.keys_per_side:
        asking = flag("side_topk" if config.side_topk else "topk")
        raise UltraMemError(
            f"{asking} is {config.shortlist}, more than the {config.keys_per_side} keys of a side "
            f"({flag('num_keys')} {config.num_keys} x sqrt of {flag('value_expansion')} "
            f"{config.value_expansion}). Lower top-k or raise the number of keys."
        )
    if config.topk > config.shortlist**2:
        raise UltraMemError(
            f"{flag('topk')} is {config.topk}, more than the pairs of {flag('side_topk')} "
            f"{config.side_topk} keys a side, {config.shortlist**2}. Raise {flag('side_topk')}."
        )
    if config.query_per_rank and config.rank_layout != "full":
        raise UltraMemError(
            f"{flag('query_per_rank')} gives each rank a query as wide as a key: it needs "
            f"{flag('rank_layout')} full, not {config.rank_layout}."
        )


def check_alive(config: UltraMemConfig) -> None:
    """Raise UltraMemError where scores do not depend on the input: nothing before them learns."""
    if config.qk_norm == "layernorm" and config.key_dim < 2:
        raise UltraMemError(
            f"{flag('key_dim')} is {config.key_dim}; under {flag('qk_norm')} layernorm it must be "
            f"at least 2: one number less its mean is 0, and so would be all scores. Use a wider "
            f"key, or another norm."
        )
    if config.softmax and config.topk < 2:
        raise UltraMemError(
            f"{flag('topk')} is {config.topk}; under {flag('softmax')} it must be at least 2: the "
            f"softmax of one score is 1, whatever the query. Raise it, or drop {flag('softmax')}."
        )


def _check_values(config: UltraMemConfig, hidden_size: int) -> None:
    if config.value_dim % config.cores:
        raise UltraMemError(
            f"{flag('value_dim')} is {config.value_dim}, not divisible by {flag('cores')} "
            f"{config.cores}: each core scores an equal slice of a value. Use a multiple of "
            f"{config.cores}."
        )
    if not config.value_projection and config.value_expansion != 1:
        raise UltraMemError(
            f"{flag('value_expansion')} is {config.value_expansion}; without the value projection "
            f"it must be 1, because the projection is what expands the values. Drop "
            f"--no-ultramem-value-projection or use {flag('value_expansion')} 1."
        )
    if (
        not config.value_projection
        and config.values == "prevalued"
        and config.pre_dim != hidden_size
    ):
        raise UltraMemError(
            f"{flag('pre_value_dim')} is {config.pre_dim}; without the projections it must be "
            f"the hidden size ({hidden_size}). Leave it out, or "
            f"drop --no-ultramem-value-projection."
        )
    if not config.value_projection and config.value_dim != hidden_size:
        raise UltraMemError(
            f"{flag('value_dim')} is {config.value_dim}; without the value projection it must be "
            f"the hidden size ({hidden_size}). Drop --no-ultramem-value-projection or use "
            f"{flag('value_dim')} {hidden_size}."
        )
    if config.softmax and config.relu_scores:
        raise UltraMemError(
            f"{flag('softmax')} and {flag('relu_scores')} are both given; choose one of them."
        )
    if config.num_values >= 2**31:
        raise UltraMemError(
            f"{flag('num_keys')} {config.num_keys} gives {config.num_values} values; rows are "
            f"numbered in 32 bits where tables are shared, so at most {2**31 - 1} are possible in "
            f"one table. Use fewer keys, or more spans."
        )
