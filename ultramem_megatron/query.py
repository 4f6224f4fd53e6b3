"""From the hidden state to the queries: optional causal convolution, projection, norm."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultramem_megatron.config import UltraMemConfig
from ultramem_megatron.linear import Linear
from ultramem_megatron.norm import build_norm


class CausalConvolution(nn.Module):
    """Depthwise convolution over time that sees only the past (paper 3.2, bag of tricks 7)."""

    def __init__(self, hidden_size: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, kernel))

    def forward(self, x: Tensor, history: Tensor | None = None) -> Tensor:
        """x: (S, B, D), P pieces of equal length, each without gaps in time, one after the other.

        history: the (P, kernel-1, B, D) inputs before each piece; None: x is one, zeros before it.
        """
        hidden_size, kernel = self.weight.shape
        if history is None:
            history = x.new_zeros(1, kernel - 1, *x.shape[1:])
        pieces = x.reshape(len(history), -1, *x.shape[1:])
        # (P, kernel-1+S/P, B, D) to (P*B, D, kernel-1+S/P)
        padded = torch.cat([history, pieces], 1).permute(0, 2, 3, 1).flatten(0, 1)
        out = F.conv1d(padded, self.weight.unsqueeze(1), groups=hidden_size)
        return out.unflatten(0, (len(history), -1)).permute(0, 3, 1, 2).flatten(0, 1)


class QueryProjection(nn.Module):
    """Normalised queries of both sides, one set per pair of heads (or per head)."""

    def __init__(self, config: UltraMemConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.shape = (config.num_queries, 2, config.key_dim)
        kernel = config.query_conv_kernel
        self.conv = CausalConvolution(hidden_size, kernel) if kernel else None
        self.proj = Linear(hidden_size, config.num_queries * 2 * config.key_dim, bias=False)
        self.norm = build_norm(config.qk_norm, config.key_dim, eps)

    def forward(self, x: Tensor, history: Tensor | None = None) -> Tensor:
        """x: (..., D), with a convolution (S, B, D). Returns (T, Q, 2, Dk)."""
        if self.conv is not None:
            x = self.conv(x, history)
        return self.norm(self.proj(x).reshape(-1, *self.shape))
