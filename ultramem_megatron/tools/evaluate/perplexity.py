"""Perplexity of a model on an indexed data set: every token counted once.

The documents are taken as one stream, as in training, and cut into windows that do not overlap;
within a window each token is predicted from all before it in that window. The first tokens of a
window have little context, so longer windows give lower perplexities.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from ultramem_megatron.data.check import check_prefixes
from ultramem_megatron.data.index_file import Index
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.tools.evaluate.windows import batches


class Perplexity(NamedTuple):
    """loss: mean over `tokens` predicted tokens, in nats."""

    tokens: int
    loss: float

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


def read_stream(prefix: str, vocab_size: int) -> np.ndarray:
    """All tokens of PREFIX.bin in order, mapped, not read.

    vocab_size: entries of the model's vocabulary; every token is compared with it.

    Raises:
        UltraMemError: files that are missing, damaged, of different data, or of another tokenizer.
    """
    check_prefixes([prefix], vocab_size)
    stream = np.memmap(f"{prefix}.bin", dtype=Index.read(prefix).tokens, mode="r")
    if len(stream) < 2:
        raise UltraMemError(f"--data {prefix}: {len(stream)} token; give 2 at least.")
    for token in (int(stream.max()), int(stream.min())):
        if not 0 <= token < vocab_size:
            raise UltraMemError(
                f"--data {prefix} holds token {token}, but the model knows {vocab_size} tokens. It "
                f"was made with another tokenizer."
            )
    return stream


@torch.no_grad()
def perplexity(model: Any, stream: np.ndarray, length: int, batch: int) -> Perplexity:
    """Of a model in evaluation mode; tensor-parallel groups share the windows. All ranks call it.

    length: targets of a window. batch: windows in one forward pass.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state

    from ultramem_megatron.inference.lockstep import serve_until_all_finish

    replicas = parallel_state.get_data_parallel_group()
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # losses, tokens
    for one in batches(stream, length, batch, replicas.rank(), replicas.size()):
        tokens, targets = one.tokens.to(device), one.targets.to(device)
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        losses = model(tokens, positions, causal_mask(tokens.shape[1], device), labels=targets)
        counts = one.counts.to(device)
        sums += torch.stack([losses.double()[counts].sum(), counts.sum().double()])
    serve_until_all_finish(model)
    dist.all_reduce(sums, group=replicas)
    total, tokens_counted = sums.tolist()
    return Perplexity(int(tokens_counted), total / tokens_counted)


def causal_mask(length: int, device: torch.device) -> torch.Tensor:
    """(1, 1, S, S), True where attention is forbidden."""
    return torch.ones(1, 1, length, length, dtype=torch.bool, device=device).triu(1)
