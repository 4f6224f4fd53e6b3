"""Runs text through a trained model and records what each memory layer reads for each token.

T tokens, P values read of a table by one token (m*H), S sequence length.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.inference.loading import LoadedModel
from ultramem_megatron.inference.prompts import token_ids
from ultramem_megatron.memory.layer import UltraMemLayer, memory_layers
from ultramem_megatron.memory.retrieval.addresses import split_address


@dataclass(frozen=True)
class Reads:
    """Of one memory layer, for all tokens of a text."""

    layer_number: int
    keys_per_side: int
    grid: Tensor
    """(T, P) addresses in the grid of row and column keys, row * keys_per_side + column."""
    values: Tensor
    """(T, P) physical values, rows of the table."""
    groups: Tensor
    """(T, P) expansion group in which a value is read."""
    scores: Tensor
    """(T, P) mean over cores, before the softmax if there is one."""


def record_reads(loaded: LoadedModel, text: str, max_tokens: int) -> tuple[list[str], list[Reads]]:
    """The text's tokens as strings, at most `max_tokens`, and what each memory reads for them.

    The text is cut into sequences as long as the model was trained on.

    Raises:
        UltraMemError: the model has no memories, or the text no tokens.
    """
    layers = list(memory_layers(loaded.model))
    if not layers:
        raise UltraMemError("the checkpoint's model has no memory layers: nothing to inspect.")
    tokens = token_ids(loaded, text, "--text")[:max_tokens] if text else []
    if not tokens:
        raise UltraMemError("--text: no tokens in it. Give a file with text.")
    with _recorded(layers) as found, torch.no_grad():
        for start in range(0, len(tokens), loaded.args.seq_length):
            _forward(loaded.model, tokens[start : start + loaded.args.seq_length])
    words = [loaded.tokenizer.detokenize([token]) for token in tokens]
    return words, [_reads(layer, *found[layer.layer_number]) for layer in layers]


@contextmanager
def _recorded(layers: Sequence[UltraMemLayer]) -> Iterator[dict[int, tuple[list[Any], list[Any]]]]:
    """Collects addresses and scores of every retrieval, by layer number."""
    found: dict[int, tuple[list[Any], list[Any]]] = {n.layer_number: ([], []) for n in layers}
    hooks = []
    for layer in layers:

        def keep(_: Any, __: Any, out: Any, number: int = layer.layer_number) -> None:
            found[number][0].append(out.addresses)
            found[number][1].append(out.scores.mean(2))

        hooks.append(layer.retrieval.register_forward_hook(keep))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _forward(model: Any, tokens: Sequence[int]) -> None:
    device = next(model.parameters()).device
    tokens_1S = torch.tensor([list(tokens)], device=device)
    positions_1S = torch.arange(len(tokens), device=device)[None]
    size = len(tokens)
    later_11SS = torch.ones(1, 1, size, size, dtype=torch.bool, device=device).triu(1)
    model(tokens_1S, positions_1S, later_11SS)


def _reads(layer: UltraMemLayer, addresses: list[Tensor], scores: list[Tensor]) -> Reads:
    grid_TP = torch.cat(addresses)
    values_TP, groups_TP = split_address(layer.locate(grid_TP), layer.config.num_values)
    return Reads(
        layer_number=layer.layer_number,
        keys_per_side=layer.config.keys_per_side,
        grid=grid_TP.cpu(),
        values=values_TP.cpu(),
        groups=groups_TP.cpu(),
        scores=torch.cat(scores).float().cpu(),
    )
