"""The key sets of all heads, and the best keys of both sides for a query.

T tokens, H heads, Q queries, S = 2 sides (row, column), N keys per side (already expanded, e*n),
R Tucker rank, K width of one rank's key.
"""

from typing import Self

import torch
from torch import Tensor, nn

from ultramem_megatron.kernels.precision import at_least_float32
from ultramem_megatron.kernels.side_topk import kept_keys, side_topk
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.initialization.draws import Draw
from ultramem_megatron.memory.initialization.scales import Scales
from ultramem_megatron.memory.modules import build_norm, fill_gain


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
        keys = self._normed() if self.fixed is None else self.fixed
        count = self.config.keys_per_side
        return side_topk(self._per_head_and_rank(query), keys, directions, topk, count)

    def scores(self, query: Tensor) -> Tensor:
        """Scores of every key (T, H, S, R, N), at least float32, for queries as `forward` takes."""
        keys = at_least_float32(self._normed())
        queries = self._per_head_and_rank(at_least_float32(query))
        return torch.einsum("thsrk,hsnrk->thsrn", queries, keys)

    def fix(self) -> None:
        """Normalise the keys once for all uses, until `train()`: for weights that stay as they are.

        With few tokens, as in decoding, the norm would take longer than the scores.
        """
        with torch.no_grad():
            normed = self._normed()
        # To convert them takes as long as to norm them.
        self.fixed = kept_keys(normed, shared=self.config.num_queries == 1)

    def train(self, mode: bool = True) -> Self:
        """As nn.Module.train; in training mode keys are normalised at each use."""
        if mode:
            self.fixed = None
        return super().train(mode)

    def _normed(self) -> Tensor:
        """(H, S, N, R, K). With split ranks the slices of one key are normalised together."""
        by_key = self.weight.view(*self.weight.shape[:3], -1, self.config.key_dim)
        return self.norm(by_key).view_as(self.weight)

    def _per_head_and_rank(self, query: Tensor) -> Tensor:
        """(T, H, S, R, K); a view where each query serves one head, or one query all."""
        heads, _, _, ranks, width = self.weight.shape
        tokens, queries, sides, _ = query.shape
        if self.config.query_per_rank or self.config.rank_layout == "split":
            by_rank = query.view(tokens, queries, 1, sides, ranks, width)
        else:
            by_rank = query.view(tokens, queries, 1, sides, 1, width)
        per_query = -(-heads // queries)
        per_head = by_rank.expand(-1, -1, per_query, -1, ranks, -1).flatten(1, 2)
        return per_head[:, :heads]  # of an odd number the last has its query alone
