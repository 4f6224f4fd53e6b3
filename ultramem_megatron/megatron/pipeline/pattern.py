"""--hybrid-layer-pattern: one symbol a layer, `|` where a pipeline stage or virtual chunk ends.

Layers are counted from 1, without the `|`. Each is one addition to the residual stream: what a GPT
calls a layer is two of them, `*-`. Behind a `/` stand the layers of a head for later tokens.
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
_KEPT_AS, _HEADS_KEPT_AS = "layers_by_stage", "heads_for_later_tokens"


def stages(pattern: str) -> tuple[str, ...]:
    """The symbols of each pipeline stage or virtual chunk, in the order of layers."""
    return tuple(pattern.split("/")[0].split("|"))


def heads(pattern: str) -> str:
    """What a pattern says of heads for later tokens, with the / before each; "": it has none."""
    _, slash, rest = pattern.partition("/")
    return slash + rest


def readable_layers(pattern: str) -> tuple[int, ...]:
    """Numbers of the layers at which a memory can read."""
    layers = "".join(stages(pattern))
    return tuple(number for number, symbol in enumerate(layers, start=1) if symbol in READABLE)


def keep_pattern(config: Any, pattern: str) -> None:
    """Let `kept_stages` find the pattern: Megatron's TransformerConfig has no field for it."""
    setattr(config, _KEPT_AS, stages(pattern))
    setattr(config, _HEADS_KEPT_AS, heads(pattern))


def kept_stages(config: Any) -> tuple[str, ...] | None:
    """As `stages`, of the pattern that was kept; None: the model is a GPT."""
    found: tuple[str, ...] | None = getattr(config, _KEPT_AS, None)
    return found


def kept_heads(config: Any) -> str:
    """As `heads`, of the pattern that was kept."""
    found: str = getattr(config, _HEADS_KEPT_AS, "")
    return found
