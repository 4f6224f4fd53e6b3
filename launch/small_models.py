"""Small GPTs for a CPU: the flags that quickstart, experiments and benchmarks share."""

import math
from collections.abc import Mapping

from ultramem_megatron.presets.preset import Value

Flags = Mapping[str, Value]
"""Megatron's flags without their dashes, and their values."""


def plain_gpt(*, layers: int, hidden: int, heads: int, length: int) -> dict[str, Value]:
    """A GPT as the paper's presets are, for sequences of `length` tokens."""
    return {
        "num-layers": layers,
        "hidden-size": hidden,
        "num-attention-heads": heads,
        "seq-length": length,
        "max-position-embeddings": length,
        "position-embedding-type": "rope",
        "disable-bias-linear": True,
        "untie-embeddings-and-output-weights": True,
    }


def text_gpt(*, layers: int, hidden: int, heads: int, length: int) -> dict[str, Value]:
    """The same, to be trained on real text in few steps."""
    return {
        **plain_gpt(layers=layers, hidden=hidden, heads=heads, length=length),
        "normalization": "RMSNorm",
        "hidden-dropout": 0.0,
        "attention-dropout": 0.0,
        # With Megatron's 0.02 for both, memories live, but 400 steps of the quickstart end at a
        # validation loss of 5.12, not 4.75.
        "embedding-init-method-std": 0.5,
        "init-method-std": round(math.sqrt(2 / (5 * hidden)), 3),  # as in the paper
    }
