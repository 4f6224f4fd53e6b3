"""What of --hybrid-layer-pattern is refused before anything is built."""

import importlib.util
import math
from argparse import Namespace

import torch
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.pipeline.pattern import (
    FLAG,
    READABLE,
    heads,
    readable_layers,
    stages,
)
from ultramem_megatron.memory.config import UltraMemConfig

_NAMES = {
    Symbols.MAMBA: "Mamba",
    Symbols.GDN: "a gated delta net",
    Symbols.ATTENTION: "attention",
    Symbols.DS_ATTENTION: "sparse attention",
    Symbols.MLA: "latent attention",
}
_MAMBA_EXPANSION = 2  # of MambaMixer, which no flag sets
_OF_THE_ENGINE = (Symbols.GDN, Symbols.DS_ATTENTION, Symbols.MLA)


def refuse_pattern(args: Namespace, ultramem: UltraMemConfig | None) -> None:
    """Raise UltraMemError for a pattern that this machine, or a memory, cannot do with."""
    pattern = args.hybrid_layer_pattern
    if pattern is None:
        return
    given = f"{FLAG} {pattern}"
    if Symbols.MOE in pattern and not args.num_experts:
        raise UltraMemError(f"{given}: it has experts ('E'). Add --num-experts.")
    if Symbols.MAMBA in pattern:
        _check_mamba_heads(args)
    if args.transformer_impl == "local":
        _check_local(given, pattern)
    if args.pipeline_model_parallel_size > 1 and len(stages(pattern)) == 1:
        raise UltraMemError(
            f"{given}: it does not say where the {args.pipeline_model_parallel_size} stages of "
            f"--pipeline-model-parallel-size end. Write a | there, for example "
            f"{_cut(pattern, args.pipeline_model_parallel_size)}."
        )
    if ultramem is not None:
        _check_memories(args, given, ultramem)


def _check_mamba_heads(args: Namespace) -> None:
    """As MambaMixer asserts: heads in whole groups, both in whole tensor-parallel parts."""
    for name in ("mamba_state_dim", "mamba_head_dim", "mamba_num_groups"):
        if getattr(args, name) < 1:
            given = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise UltraMemError(f"{given}: it must be at least 1.")
    inner = _MAMBA_EXPANSION * args.hidden_size
    heads, groups = args.mamba_num_heads or inner // args.mamba_head_dim, args.mamba_num_groups
    words = f"--mamba-num-heads {heads}"
    if not args.mamba_num_heads:
        words = (
            f"Mamba's {_MAMBA_EXPANSION} * --hidden-size {args.hidden_size} make {heads} heads of "
            f"--mamba-head-dim {args.mamba_head_dim}"
        )
        if inner % args.mamba_head_dim:
            raise UltraMemError(f"{words}, and something is left. Give a divisor of {inner}.")
    parts = args.tensor_model_parallel_size
    for whole, name, part, other in (
        (heads, words, groups, "--mamba-num-groups"),
        (heads, words, parts, "--tensor-model-parallel-size"),
        (groups, f"--mamba-num-groups {groups}", parts, "--tensor-model-parallel-size"),
    ):
        if whole % part:
            raise UltraMemError(
                f"{name}: not divisible by {other} {part}. Change one of them, for example to "
                f"{other} {math.gcd(whole, part)}."
            )


def _check_local(given: str, pattern: str) -> None:
    """What Megatron's own layers (--transformer-impl local) are not there for."""
    for symbol in _OF_THE_ENGINE:
        if symbol in pattern:
            raise UltraMemError(
                f"{given}: {_NAMES[symbol]} ({symbol!r}) needs --transformer-impl "
                f"transformer_engine. Leave it out, or install Transformer Engine."
            )
    has_kernels = importlib.util.find_spec("mamba_ssm") is not None
    if Symbols.MAMBA in pattern and torch.cuda.is_available() and not has_kernels:
        raise UltraMemError(
            f"{given}: Mamba layers ('M') need the package mamba-ssm on GPUs. Install it."
        )


def _check_memories(args: Namespace, given: str, ultramem: UltraMemConfig) -> None:
    layers = "".join(stages(args.hybrid_layer_pattern))
    if args.mla_down_proj_fusion:
        raise UltraMemError(
            f"--mla-down-proj-fusion cannot be combined with memory layers and {given}: it looks "
            f"for latent attention in one spec of all its layers. Drop the flag."
        )
    for span in ultramem.spans:
        symbol = layers[span.start - 1]
        if symbol not in READABLE:
            raise UltraMemError(
                f"--ultramem-spans {span}: layer {span.start} of {given} is {symbol!r} "
                f"({_NAMES[symbol]}), but a memory reads what an MLP ('-') or experts ('E') read: "
                f"{_readable(args.hybrid_layer_pattern)}."
            )


def _readable(pattern: str) -> str:
    numbers = readable_layers(pattern)
    if not numbers:
        return "there is none, so it can have no memories"
    return f"start it at one of {', '.join(map(str, numbers))}"


def _cut(pattern: str, parts: int) -> str:
    """The pattern with a | after every equal part of its layers."""
    layers = "".join(stages(pattern))
    size = -(-len(layers) // parts)
    cut = "|".join(layers[at : at + size] for at in range(0, len(layers), size))
    return cut + heads(pattern)
