"""Parameters and FLOPs of memory layers, counted on a layer built without storage."""

import functools
from typing import NamedTuple

import torch

from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.layer import UltraMemLayer


class MemorySize(NamedTuple):
    """Of all memory layers of a model together.

    dense: parameters every token uses (projections, keys, cores, norms); sparse: the value tables;
    flops_per_token: multiply-adds x 2 of one forward pass.
    """

    dense: int
    sparse: int
    flops_per_token: int


@functools.cache
def memory_size(config: UltraMemConfig, hidden_size: int) -> MemorySize:
    """Size of the memory layers of `config` in a model of this hidden size.

    FLOPs are 2 x (dense parameters + pooled elements H*m*Dv) per layer, the count with which the
    paper's tables come out.
    """
    with torch.device("meta"):
        layer = UltraMemLayer(config, hidden_size=hidden_size, num_layers=config.spans[-1].end)
    total = sum(parameter.numel() for parameter in layer.parameters())
    sparse = layer.values.weight.numel()
    pooled = config.picks * config.value_dim
    layers = len(config.spans)
    dense = total - sparse
    return MemorySize(layers * dense, layers * sparse, layers * 2 * (dense + pooled))


def training_flops(config: UltraMemConfig, hidden_size: int, tokens: int) -> int:
    """FLOPs of forward and backward for `tokens`; the backward counts twice the forward."""
    return 3 * tokens * memory_size(config, hidden_size).flops_per_token
