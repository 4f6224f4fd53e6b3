"""What each memory of a folder for transformers reads, as `reads` records it of a checkpoint.

T tokens, P values read of a table by one token (m*H), C cores.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.retrieval.addresses import split_address
from ultramem_megatron.tools.export.hf.memory_ultramem import UltraMemMemory
from ultramem_megatron.tools.export.opened_folder import OpenedFolder
from ultramem_megatron.tools.inspect.reads import Reads


def record_hf_reads(
    opened: OpenedFolder, text: str, max_tokens: int
) -> tuple[list[str], list[Reads]]:
    """As `record_reads`; the text is cut into sequences as long as the model has positions for.

    Raises:
        UltraMemError: the model has no memories, or the text no tokens.
    """
    memories = memories_of(opened)
    tokens = opened.ids(text, "--text")[:max_tokens]
    if not tokens:
        raise UltraMemError("--text: no tokens in it. Give a file with text.")
    length = opened.model.config.max_position_embeddings
    with retrievals(memories) as found, torch.no_grad():
        for start in range(0, len(tokens), length):
            opened.model(torch.tensor([tokens[start : start + length]]))
    words = [opened.text([token]) for token in tokens]
    return words, [_reads(number, memories[number], found[number]) for number in memories]


def memories_of(opened: OpenedFolder) -> dict[int, UltraMemMemory]:
    """The memories of a model by their layers' numbers. Raises UltraMemError: it has none."""
    layers = enumerate(opened.model.model.layers, 1)
    memories = {number: layer.memory for number, layer in layers if layer.memory is not None}
    if not memories:
        raise UltraMemError("the folder's model has no memory layers: nothing to inspect.")
    return memories


@contextmanager
def retrievals(memories: dict[int, UltraMemMemory]) -> Iterator[dict[int, list[Any]]]:
    """Collects what every retrieval found meanwhile, by layer number: rows, columns, scores."""
    found: dict[int, list[Any]] = {number: [] for number in memories}
    hooks = [
        memory.retrieval.register_forward_hook(lambda _, __, out, n=number: found[n].append(out))
        for number, memory in memories.items()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _reads(number: int, memory: UltraMemMemory, found: Sequence[tuple[Tensor, ...]]) -> Reads:
    row, column, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
    values_TP, groups_TP = split_address(memory.locate(row, column), memory.number)
    return Reads(
        layer_number=number,
        keys_per_side=memory.side,
        grid=(row * memory.side + column).flatten(1),
        values=values_TP,
        groups=groups_TP,
        scores=scores.flatten(1, 2).mean(2).float(),
    )
