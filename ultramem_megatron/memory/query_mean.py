"""What the queries of all tokens have in common, kept over steps and taken off before them.

In its first steps every model learns the frequencies of tokens, and the hidden states of all of
them get one large common part. No norm over features removes it: queries become one, all tokens
read the same few values, and no others are trained any more. Product-key memories subtract a mean
over the batch there (batch norm), with which a token sees later ones; a mean of the steps before
does not, and is the same in training, evaluation and decoding.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ultramem_megatron.kernels.query_centring import Centring, centred_reference, update_mean
from ultramem_megatron.memory.precise_buffers import PreciseBuffers

MOMENTUM = 0.9


class QueryMean(PreciseBuffers):
    """Running mean (D,) over the tokens of the steps before: x minus it is what is projected.

    Forward sums up what it sees in training; `update` takes the sums in, once per optimizer step,
    so that micro-batches and ranks make no difference. The first `1 / (1 - MOMENTUM)` steps weigh
    the same, later ones fall off exponentially.
    """

    precise: ClassVar = ("mean", "updates", "sums")
    mean: Tensor
    updates: Tensor
    sums: Tensor
    frozen = False
    """Set it to have training leave the mean as it is."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        precise = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer("mean", torch.zeros(hidden_size, dtype=precise))
        self.register_buffer("updates", torch.zeros(1, dtype=precise))
        # Of inputs since the last update, and behind them their number.
        self.register_buffer("sums", torch.zeros(hidden_size + 1, dtype=precise), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D); the same shape and dtype. Inputs under recomputation count once."""
        return centred_reference(x, self.centring())

    def centring(self) -> Centring:
        """What a forward takes off, and where it adds its inputs to, if they count."""
        counts = self.training and torch.is_grad_enabled() and not self.frozen
        return Centring(self.mean, self.sums if counts else None)

    def update(self, reduce: Callable[[Tensor], object] | None = None) -> None:
        """Take in what was seen since the last update; nothing seen, or NaN, leaves the mean alone.

        reduce: sums its argument over the ranks that see other tokens, in place.
        """
        if reduce is not None:
            reduce(self.sums)
        update_mean(self.mean, self.updates, self.sums, MOMENTUM)

    @torch.no_grad()
    def reset(self) -> None:
        """As if nothing had been seen."""
        for buffer in (self.mean, self.updates, self.sums):
            buffer.zero_()
