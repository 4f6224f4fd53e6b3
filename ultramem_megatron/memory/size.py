"""Parameters and FLOPs of memory layers, counted on a layer built without storage."""

import functools
from typing import NamedTuple

import torch

from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.layer import UltraMemLayer
from ultramem_megatron.memory.placement import placements
from ultramem_megatron.memory.tables.value_table import value_tables


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

    FLOPs are 2 x (dense parameters + elements read, H*m*Dv and H*m*Dp of pre-values) per layer, the
    count with which the paper's tables come out.
    """
    with torch.device("meta"):
        layer = UltraMemLayer(config, hidden_size=hidden_size, num_layers=config.spans[-1].end)
    total = sum(parameter.numel() for parameter in layer.parameters())
    tables = [table.weight for table in value_tables(layer).values()]
    sparse = sum(table.numel() for table in tables)
    read = config.picks * sum(table.shape[1] for table in tables)
    layers, owners = len(config.spans), {place.table for place in placements(config)}
    dense = total - sparse
    return MemorySize(layers * dense, len(owners) * sparse, layers * 2 * (dense + read))


def training_flops(config: UltraMemConfig, hidden_size: int, tokens: int) -> int:
    """FLOPs of forward and backward for `tokens`; the backward counts twice the forward."""
    return 3 * tokens * memory_size(config, hidden_size).flops_per_token
