"""Memory-only training: every weight outside of memory layers, or of their values, is frozen."""

from typing import Any

from torch import Tensor, nn

from ultramem_megatron.memory.layer import memory_layers
from ultramem_megatron.memory.tables.value_table import value_tables


def freeze_untrained(chunks: list[nn.Module], config: Any) -> None:
    """Freeze what a model config says is not trained: MemorySettings of `megatron/model.py`."""
    if config.train_rows is not None:
        train_only_values(chunks)
    elif config.train_only_memory:
        train_only_memory(chunks)


def train_only_memory(chunks: list[nn.Module]) -> None:
    """Freeze all parameters of this rank's chunks but those of their memory layers."""
    _freeze(chunks)
    for chunk in chunks:
        for layer in memory_layers(chunk):
            layer.requires_grad_(True)


def train_only_values(chunks: list[nn.Module]) -> None:
    """Freeze all but the value tables, with pre-values; also what queries have in common.

    So which rows a token reads stays as it is (sparse memory finetuning, arXiv 2510.15103).
    """
    _freeze(chunks)
    for chunk in chunks:
        for layer in memory_layers(chunk):
            for table in value_tables(layer).values():
                table.requires_grad_(True)
            if layer.query.common is not None:
                layer.query.common.frozen = True


def _freeze(chunks: list[nn.Module]) -> None:
    """Freeze all.

    To be called before Megatron wraps the chunks: frozen parameters then have neither gradient
    buffer nor optimizer state. Embeddings are made to require a gradient all the same, or
    recomputation, and the first pipeline stage, would take the layers above for constants.
    """
    for chunk in chunks:
        chunk.requires_grad_(False)
        embedding = getattr(chunk, "embedding", None)
        if embedding is not None:
            embedding.register_forward_hook(_require_gradient)


def _require_gradient(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.requires_grad_()
