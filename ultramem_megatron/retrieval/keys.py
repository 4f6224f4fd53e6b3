"""The key sets of all heads, and the best keys of both sides for a query.

T tokens, H heads, Q queries, S = 2 sides (row, column), N keys per side (already expanded, e*n),
R Tucker rank, K width of one rank's key.
"""

import torch
from torch import Tensor, nn

from ultramem_megatron.config import UltraMemConfig
from ultramem_megatron.kernels.side_topk import side_topk
from ultramem_megatron.norm import build_norm


class ProductKeys(nn.Module):
    """Keys of every head and side, normalised at each use (paper 3.2 and eq. 4-5)."""

    def __init__(self, config: UltraMemConfig, eps: float) -> None:
        super().__init__()
        self.config = config
        shape = (config.heads, 2, config.keys_per_side, config.tucker_rank, config.rank_key_dim)
        self.weight = nn.Parameter(torch.empty(shape))
        self.norm = build_norm(config.qk_norm, config.key_dim, eps)

    def forward(self, query: Tensor, directions: Tensor, topk: int) -> tuple[Tensor, Tensor]:
        """The m keys of each side with the largest scores, combined over ranks by `directions`.

        query: (T, Q, S, Dk), normalised; head i reads query i * Q // H. directions: (S, H, R).
        Returns keys (T, H, S, m), ascending, and their scores (T, H, S, R, m), at least float32.
        """
        # With split ranks the slices of one key are normalised together, over Dk.
        normed = self.norm(self.weight.view(*self.weight.shape[:3], -1, self.config.key_dim))
        return side_topk(
            self._per_head_and_rank(query), normed.view_as(self.weight), directions, topk
        )

    def _per_head_and_rank(self, query: Tensor) -> Tensor:
        """(T, H, S, R, K); a view where each query serves one head, or one query all."""
        heads, _, _, ranks, width = self.weight.shape
        tokens, queries, sides, _ = query.shape
        if self.config.rank_layout == "split":
            by_rank = query.view(tokens, queries, 1, sides, ranks, width)
        else:
            by_rank = query.view(tokens, queries, 1, sides, 1, width)
        per_query = heads // queries
        return by_rank.expand(-1, -1, per_query, -1, ranks, -1).flatten(1, 2)
