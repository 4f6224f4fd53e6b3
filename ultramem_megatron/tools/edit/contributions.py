"""How much each value contributes to what the memories add where a fact is said.

F positions that predict the fact's tokens, P picks of a position, C cores, E expansion, V value
dim, D hidden.
"""

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ultramem_megatron.memory.retrieval.addresses import split_address
from ultramem_megatron.tools.edit.fact import Fact
from ultramem_megatron.tools.export.hf.memory_ultramem import UltraMemMemory
from ultramem_megatron.tools.export.hf.quantized_ultramem import QuantizedTable
from ultramem_megatron.tools.export.opened_folder import OpenedFolder
from ultramem_megatron.tools.inspect.hf_reads import (
    grid_address,
    memories_of,
    number_of_values,
    retrievals,
)


class Contribution(NamedTuple):
    """Of one value, over the positions that predict a fact's tokens."""

    layer: int
    value: int
    share: float
    """Of its memory's output, along that output, mean over positions: all values' add up to 1."""
    reads: int
    """How often it was picked; several times at a position, where heads or groups agree."""


@torch.no_grad()
def contributions(opened: OpenedFolder, fact: Fact) -> list[Contribution]:
    """Of all values that fire for a fact, the largest share first. Raises UltraMemError."""
    memories = memories_of(opened)
    outputs: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        return lambda _, __, out: outputs.__setitem__(number, out[0])

    hooks = [memory.register_forward_hook(keep(n)) for n, memory in memories.items()]
    try:
        with retrievals(memories) as found:
            opened.model(torch.tensor([fact.ids]))
    finally:
        for hook in hooks:
            hook.remove()
    listed: list[Contribution] = []
    for number, memory in memories.items():
        parts = (torch.cat(part)[fact.predicting] for part in zip(*found[number], strict=True))
        listed += _of_memory(number, memory, outputs[number][fact.predicting], *parts)
    return sorted(listed, key=lambda one: (-one.share, one.layer, one.value))


def _of_memory(
    number: int, memory: UltraMemMemory, output_FD: Tensor, row: Tensor, column: Tensor, raw: Tensor
) -> list[Contribution]:
    scores = raw.softmax(2) if memory.softmax else raw
    at = (row, column) if memory.shuffle is None else memory.shuffle(row, column)
    values_FP, groups_FP = split_address(grid_address(memory, *at), number_of_values(memory))
    shares_FP = _shares(memory, values_FP, groups_FP, scores.flatten(1, 2).float(), output_FD)
    totals: dict[int, float] = defaultdict(float)
    reads: dict[int, int] = defaultdict(int)
    for value, share in zip(
        values_FP.flatten().tolist(), shares_FP.flatten().tolist(), strict=True
    ):
        totals[value] += share / len(output_FD)
        reads[value] += 1
    return [Contribution(number, value, totals[value], reads[value]) for value in totals]


def _shares(
    memory: UltraMemMemory, values_FP: Tensor, groups_FP: Tensor, scores_FPC: Tensor, out_FD: Tensor
) -> Tensor:
    """(F, P): the part of each pick's addend along the output, over the output's length."""
    out_FD = out_FD.float()
    weight = None if memory.value_proj is None else memory.value_proj.weight.float()  # (D, E*V)
    back_FEV = (out_FD if weight is None else out_FD @ weight).unflatten(
        1, (memory.values.expansion, -1)
    )
    wanted_FPV = back_FEV.gather(1, groups_FP[..., None].expand(-1, -1, back_FEV.shape[2]))
    rows_FPV = _rows(memory, values_FP.flatten()).view(wanted_FPV.shape)
    cores = scores_FPC.shape[2]
    added_FPV = (rows_FPV.unflatten(2, (cores, -1)) * scores_FPC[..., None]).flatten(2)
    along_FP: Tensor = (added_FPV * wanted_FPV).sum(2)
    return along_FP / out_FD.square().sum(1, keepdim=True).clamp(min=torch.finfo().tiny)


def _rows(memory: UltraMemMemory, rows: Tensor) -> Tensor:
    table = memory.values
    if isinstance(table, QuantizedTable):
        return table.read(rows)
    return table.weight[rows].float()
