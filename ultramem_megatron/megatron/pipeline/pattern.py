"""--hybrid-layer-pattern: one symbol a layer, `|` where a pipeline stage or virtual chunk ends.

Layers are counted from 1, without the `|`. Each is one addition to the residual stream: what a GPT
calls a layer is two of them, `*-`.
"""

from typing import Any

FLAG = "--hybrid-layer-pattern"
ATTENTION, MAMBA, MLP, EXPERTS = (
    "*",
    "M",
    "-",
    "E",
)  # as Megatron's Symbols, whose import takes seconds
READABLE = (MLP, EXPERTS)
"""Layers with a pre-MLP norm, whose output a memory reads."""
_KEPT_AS = "layers_by_stage"


def stages(pattern: str) -> tuple[str, ...]:
    """The symbols of each pipeline stage or virtual chunk, in the order of layers."""
    return tuple(pattern.split("/")[0].split("|"))


def readable_layers(pattern: str) -> tuple[int, ...]:
    """Numbers of the layers at which a memory can read."""
    layers = "".join(stages(pattern))
    return tuple(number for number, symbol in enumerate(layers, start=1) if symbol in READABLE)


def keep_pattern(config: Any, pattern: str) -> None:
    """Let `kept_stages` find the pattern: Megatron's TransformerConfig has no field for it."""
    setattr(config, _KEPT_AS, stages(pattern))


def kept_stages(config: Any) -> tuple[str, ...] | None:
    """As `stages`, of the pattern that was kept; None: the model is a GPT."""
    found: tuple[str, ...] | None = getattr(config, _KEPT_AS, None)
    return found
