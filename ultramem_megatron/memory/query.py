"""From the hidden state to the queries: convolution and mean (both optional), projection, norm."""

import math

import torch
from torch import Tensor, nn

from ultramem_megatron.kernels.causal_convolution import causal_convolution, causal_convolution_step
from ultramem_megatron.kernels.query_centring import Centring
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.initialization.draws import Draw
from ultramem_megatron.memory.initialization.scales import Scales
from ultramem_megatron.memory.modules import Linear, build_norm, fill_gain, zero_bias
from ultramem_megatron.memory.query_mean import QueryMean


class CausalConvolution(nn.Module):
    """Depthwise convolution over time that sees only the past (paper 3.2, bag of tricks 7)."""

    def __init__(self, hidden_size: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, kernel))

    def forward(
        self,
        x: Tensor,
        history: Tensor | None = None,
        reach: Tensor | None = None,
        advances: bool = False,
        centring: Centring | None = None,
    ) -> Tensor:
        """x: (S, B, D) to the same; see `causal_convolution_reference`.

        advances: x is one position, and goes into its history (K-1, B, D); see
        `causal_convolution_step_reference`. centring: of the result, by `centred_reference`.
        """
        if advances:
            assert history is not None, "there is nothing to advance"
            return causal_convolution_step(x, self.weight, history, centring)
        return causal_convolution(x, self.weight, history, reach, centring)


class QueryProjection(nn.Module):
    """Normalised queries of both sides, one set per pair of heads (or per head)."""

    def __init__(self, config: UltraMemConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.ranks = config.tucker_rank if config.query_per_rank else 1
        self.shape = (config.num_queries, 2, self.ranks, config.key_dim)
        kernel = config.query_conv_kernel
        self.conv = CausalConvolution(hidden_size, kernel) if kernel else None
        self.common = QueryMean(hidden_size) if config.query_centering else None
        self.proj = Linear(hidden_size, math.prod(self.shape), bias=config.projection_bias)
        self.norm = build_norm(config.qk_norm, config.key_dim, eps)

    @torch.no_grad()
    def reset(self, draw: Draw, scales: Scales) -> None:
        """Initial values; the convolution is the identity, inert at the start."""
        draw.weights_(self.proj.weight, scales.query, "query", uniform=scales.uniform)
        zero_bias(self.proj)
        fill_gain(self.norm, scales.query_gain)
        if self.common is not None:
            self.common.reset()
        if self.conv is not None:
            self.conv.weight.zero_()
            self.conv.weight[:, -1] = 1

    def forward(
        self,
        x: Tensor,
        history: Tensor | None = None,
        reach: Tensor | None = None,
        advances: bool = False,
    ) -> Tensor:
        """x: (..., D), with a convolution (S, B, D). Returns (T, Q, 2, Dk).

        With queries per rank those of one side follow each other: (T, Q, 2, R*Dk).
        """
        if self.conv is not None:
            centring = None if self.common is None else self.common.centring()
            x = self.conv(x, history, reach, advances, centring)
        elif self.common is not None:
            x = self.common(x)
        return self.norm(self.proj(x).reshape(-1, *self.shape)).flatten(3)
