"""How much each value contributes to what the memories add where a fact is said.

F positions that predict the fact's tokens, P picks of a position, C cores, D hidden.
"""

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ultramem_megatron.memory.retrieval.addresses import split_address
from ultramem_megatron.tools.edit.fact import Fact
from ultramem_megatron.tools.export.hf.memory_ultramem import UltraMemMemory
from ultramem_megatron.tools.export.opened_folder import OpenedFolder
from ultramem_megatron.tools.inspect.hf_reads import memories_of, retrievals


class Contribution(NamedTuple):
    """Of one value, over the positions that predict a fact's tokens."""

    layer: int
    value: int
    share: float
    """Of its memory's output, along that output, mean over positions: all values' add up to 1."""
    reads: int
    """How often it was picked; several times at a position, where heads or groups agree."""


class _Read(NamedTuple):
    """What a memory was given: its input (F, D), and the tables that it shares, or None."""

    x: Tensor
    tables: Any


@torch.no_grad()
def contributions(opened: OpenedFolder, fact: Fact) -> list[Contribution]:
    """Of all values that fire for a fact, the largest share first. Raises UltraMemError."""
    memories = memories_of(opened)
    given: dict[int, _Read] = {}

    def keep(number: int) -> Any:
        return lambda _, args, kwargs: given.__setitem__(
            number, _Read(args[0][0, fact.predicting], kwargs["tables"])
        )

    hooks = [m.register_forward_pre_hook(keep(n), with_kwargs=True) for n, m in memories.items()]
    try:
        with retrievals(memories) as found:
            opened.model(torch.tensor([fact.ids]))
    finally:
        for hook in hooks:
            hook.remove()
    listed: list[Contribution] = []
    for number, memory in memories.items():
        parts = (torch.cat(part)[fact.predicting] for part in zip(*found[number], strict=True))
        listed += _of_memory(number, memory, given[number], *parts)
    return sorted(listed, key=lambda one: (-one.share, one.layer, one.value))


def _of_memory(
    number: int, memory: UltraMemMemory, given: _Read, row: Tensor, column: Tensor, scores: Tensor
) -> list[Contribution]:
    addresses_FP = memory.locate(row, column)
    shares_FP = _shares(memory, given, addresses_FP, memory.weights(scores))
    values_FP, _ = split_address(addresses_FP, memory.number)
    totals: dict[int, float] = defaultdict(float)
    reads: dict[int, int] = defaultdict(int)
    for value, share in zip(
        values_FP.flatten().tolist(), shares_FP.flatten().tolist(), strict=True
    ):
        totals[value] += share / len(values_FP)
        reads[value] += 1
    return [Contribution(number, value, totals[value], reads[value]) for value in totals]


def _shares(
    memory: UltraMemMemory, given: _Read, addresses_FP: Tensor, weights_FPC: Tensor
) -> Tensor:
    """(F, P): the part of each pick's addend along the output, over the output's length.

    The output is a sum over picks, each linear in its weights: its slope times them is its addend.
    """
    with torch.enable_grad():
        weights_FPC = weights_FPC.requires_grad_()
        added_FD = memory.read(addresses_FP, weights_FPC, *given).float()
        bias = None if memory.value_proj is None else memory.value_proj.bias
        if bias is not None:  # which no value brings
            added_FD = added_FD - bias.float()
        along = (added_FD * added_FD.detach()).sum()
        [slopes_FPC] = torch.autograd.grad(along, [weights_FPC])
    length_F1 = added_FD.detach().square().sum(1, keepdim=True)
    shares_FP: Tensor = (slopes_FPC * weights_FPC.detach()).sum(2)
    return shares_FP / length_F1.clamp(min=torch.finfo().tiny)
