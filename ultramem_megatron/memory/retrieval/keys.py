"""The key sets of all heads, and the best keys of both sides for a query.

T tokens, H heads, Q queries, S = 2 sides (row, column), N keys per side (already expanded, e*n),
R Tucker rank, K width of one rank's key.
"""

from typing import Self

import torch
from torch import Tensor, nn

from ultramem_megatron.kernels.precision import at_least_float32
from ultramem_megatron.kernels.side_topk import (
    kept_keys,
    per_head_and_rank,
    queries_apart,
    side_topk,
)
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.initialization.draws import Draw
from ultramem_megatron.memory.initialization.scales import Scales
from ultramem_megatron.memory.modules import LayerNorm, RMSNorm, build_norm, fill_gain


class ProductKeys(nn.Module):
    """Keys of every head and side, normalised at each use (paper 3.2 and eq. 4-5)."""

    fixed: Tensor | None

    def __init__(self, config: UltraMemConfig, eps: float) -> None:
        super().__init__()
        self.config = config
        shape = (config.heads, 2, config.keys_per_side, config.tucker_rank, config.rank_key_dim)
        self.weight = nn.Parameter(torch.empty(shape))
        self.norm = build_norm(config.qk_norm, config.key_dim, eps)
        self.register_buffer("fixed", None, persistent=False)

    @torch.no_grad()
    def reset(self, draw: Draw, scales: Scales) -> None:
        """Initial values."""
        draw.weights_(self.weight, scales.keys, "keys", uniform=scales.uniform)
        fill_gain(self.norm, scales.key_gain)

    def forward(self, query: Tensor, directions: Tensor, topk: int) -> tuple[Tensor, Tensor]:
        """The m keys of each side with the largest scores, combined over ranks by `directions`.

        query: (T, Q, S, Dk), normalised, or one for each rank, (T, Q, S, R*Dk); head i reads query
        i * Q // H. directions: (S, H, R).
        Returns keys (T, H, S, m), ascending, and their scores (T, H, S, R, m), at least float32.
        """
        keys = self._for_products() if self.fixed is None else self.fixed
        count = self.config.keys_per_side
        return side_topk(self._per_rank(query), keys, directions, topk, count)

    def scores(self, query: Tensor) -> Tensor:
        """Scores of every key (T, H, S, R, N), at least float32, for queries as `forward` takes."""
        keys = at_least_float32(self._normed())
        heads, ranks = self.config.heads, self.config.tucker_rank
        queries = per_head_and_rank(self._per_rank(at_least_float32(query)), heads, ranks)
        return torch.einsum("thsrk,hsnrk->thsrn", queries, keys)

    def fix(self) -> None:
        """Normalise the keys once for all uses, until `train()`: for weights that stay as they are.

        With few tokens, as in decoding, the norm would take longer than the scores.
        """
        with torch.no_grad():
            normed = self._normed()
        # To convert them takes as long as to norm them.
        self.fixed = kept_keys(normed, self.config.num_queries)

    def train(self, mode: bool = True) -> Self:
        """As nn.Module.train; in training mode keys are normalised at each use."""
        if mode:
            self.fixed = None
        return super().train(mode)

    def _normed(self) -> Tensor:
        """(H, S, N, R, K). With split ranks the slices of one key are normalised together."""
        by_key = self.weight.view(*self.weight.shape[:3], -1, self.config.key_dim)
        return self.norm(by_key).view_as(self.weight)

    def _for_products(self) -> Tensor:
        """Normed keys for `side_topk`, by the norm itself where it can lay them out."""
        if isinstance(self.norm, LayerNorm | RMSNorm):
            normed: Tensor = self.norm(
                self.weight, queries_apart(self.config.heads, self.config.num_queries)
            )
            return normed
        return self._normed()

    def _per_rank(self, query: Tensor) -> Tensor:
        """(T, Q, S, R, K), or (T, Q, S, 1, K) where all ranks read the same; a view."""
        ranks, width = self.weight.shape[-2:]
        if self.config.query_per_rank or self.config.rank_layout == "split":
            return query.view(*query.shape[:3], ranks, width)
        return query.view(*query.shape[:3], 1, width)
