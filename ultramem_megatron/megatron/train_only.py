"""Memory-only training: every weight outside of memory layers is frozen."""

from torch import Tensor, nn

from ultramem_megatron.memory.layer import memory_layers


def train_only_memory(chunks: list[nn.Module]) -> None:
    """Freeze all parameters of this rank's chunks but those of their memory layers.

    To be called before Megatron wraps the chunks: frozen parameters then have neither gradient
    buffer nor optimizer state. Embeddings are made to require a gradient all the same, or
    recomputation, and the first pipeline stage, would take the layers above for constants.
    """
    for chunk in chunks:
        chunk.requires_grad_(False)
        for layer in memory_layers(chunk):
            layer.requires_grad_(True)
        embedding = getattr(chunk, "embedding", None)
        if embedding is not None:
            embedding.register_forward_hook(_require_gradient)


def _require_gradient(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.requires_grad_()
