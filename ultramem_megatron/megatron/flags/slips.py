"""Common slips in Megatron's flags, each said in one line before Megatron reads them.

Megatron ends such runs too, but in ZeroDivisionError, a bare assertion or a later crash that names
no flag.
"""

import math
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from ultramem_megatron.errors import UltraMemError

_WHOLE = {
    1: (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "seq_length",
        "max_position_embeddings",
        "make_vocab_size_divisible_by",
        "vocab_size",
        "num_experts",
        "moe_router_topk",
        "micro_batch_size",
        "global_batch_size",
        "train_iters",
        "train_samples",
        "lr_decay_iters",
        "lr_decay_samples",
        "save_interval",
        "log_interval",
        "tensorboard_log_interval",
        "rotary_base",
    ),
    0: ("num_workers", "seed", "eval_iters", "lr_warmup_iters", "lr_warmup_samples"),
}
"""Least value -> flags."""
_MOST = 2**31 - 1
_MOST_BUILT = {"num_layers": 10_000, "num_experts": 10_000}
"""Modules, which are built one by one."""
_NUMBERS = {
    "lr": (0, 1e6),
    "min_lr": (0, 1e6),
    "weight_decay": (0, 1e6),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_eps": (0, 1),
    "clip_grad": (0, 1e30),
    "init_method_std": (0, 1e6),
    "hidden_dropout": (0, 1),
    "attention_dropout": (0, 1),
    "rotary_percent": (1e-6, 1),
    "lr_warmup_fraction": (0, 1),
}
"""Flag -> least and most."""


def refuse_slips(args: Namespace) -> None:
    """Raise UltraMemError for numbers that no training can have. args: parsed, not yet checked."""
    for least, names in _WHOLE.items():
        for name, value in _given(args, names):
            most = _MOST_BUILT.get(name, _MOST)
            _require(least <= value <= most, name, value, f"a whole number from {least} to {most}")
    for name, (low, high) in _NUMBERS.items():
        for _, value in _given(args, (name,)):
            _require(low <= value <= high, name, value, f"a number from {low:g} to {high:g}")
    for name, value in vars(args).items():
        _require(not _is_nan(value), name, value, "a number")
    _refuse_odd_shares(args)
    _refuse_odd_rotation(args)
    if args.async_save and not args.use_persistent_ckpt_worker:
        raise UltraMemError(
            "--async-save does nothing without --use-persistent-ckpt-worker: Megatron warns and "
            "saves in the foreground. Add it, or drop --async-save."
        )
    if args.tokenizer_type == "NullTokenizer" and args.vocab_size is None:
        raise UltraMemError("--tokenizer-type NullTokenizer needs --vocab-size, its number of ids.")


def refuse_slips_of_training(args: Namespace) -> None:
    """As `refuse_slips`, of what a training needs. args: checked by Megatron."""
    if args.skip_train:
        return
    if args.train_iters is None and args.train_samples is None:
        raise UltraMemError("How long to train is not given. Use --train-iters or --train-samples.")
    if args.lr is None:
        raise UltraMemError("There is no learning rate. Give --lr.")
    for unit, train in (("iters", args.train_iters), ("samples", args.train_samples)):
        warmup = getattr(args, f"lr_warmup_{unit}")
        decay = getattr(args, f"lr_decay_{unit}") or train
        if warmup and decay and warmup >= decay:
            raise UltraMemError(
                f"--lr-warmup-{unit} {warmup}: must be less than the {decay} of --lr-decay-{unit}, "
                f"which is --train-{unit} where it is not given."
            )


def _given(args: Namespace, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    found = ((name, getattr(args, name, None)) for name in names)
    return ((name, value) for name, value in found if value is not None)


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise UltraMemError(f"--{name.replace('_', '-')} {value!s:.40}: must be {allowed}.")


def _is_nan(value: object) -> bool:
    if isinstance(value, list):
        return any(map(_is_nan, value))
    return isinstance(value, float) and math.isnan(value)


def _refuse_odd_shares(args: Namespace) -> None:
    """Numbers that one another divides, or exceeds."""
    heads, groups = args.num_attention_heads, args.num_query_groups
    if heads and args.hidden_size and not args.kv_channels and args.hidden_size % heads:
        raise UltraMemError(
            f"--hidden-size {args.hidden_size} is no multiple of --num-attention-heads {heads}. "
            f"Change one of them, or give --kv-channels."
        )
    if args.group_query_attention and heads and groups and heads % groups:
        raise UltraMemError(
            f"--num-attention-heads {heads} is no multiple of --num-query-groups {groups}. "
            f"Change one of them."
        )
    if args.num_experts and args.moe_router_topk > args.num_experts:
        raise UltraMemError(
            f"--moe-router-topk {args.moe_router_topk} is more than --num-experts "
            f"{args.num_experts}. Lower it."
        )


def _refuse_odd_rotation(args: Namespace) -> None:
    """Rotary embeddings turn numbers of a head in pairs."""
    if args.position_embedding_type != "rope" or not args.hidden_size:
        return
    width = args.kv_channels or args.hidden_size // args.num_attention_heads
    turned = int(width * args.rotary_percent)
    if turned + turned % 2 > width:
        raise UltraMemError(
            f"--position-embedding-type rope turns pairs of numbers, but a head has {width} "
            f"(--hidden-size / --num-attention-heads, or --kv-channels). Make it even."
        )
