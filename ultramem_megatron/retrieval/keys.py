"""The key sets of all heads and their scores with the queries, one score per Tucker rank.

T tokens, H heads, Q queries, N keys per side (already expanded, e*n), R Tucker rank, K width of
one rank's key. Sides: 0 row, 1 column.
"""

import torch
from torch import Tensor, nn

from ultramem_megatron.config import UltraMemConfig
from ultramem_megatron.norm import build_norm


class ProductKeys(nn.Module):
    """Keys of every head and side, normalised at each use (paper 3.2 and eq. 4-5)."""

    def __init__(self, config: UltraMemConfig, eps: float) -> None:
        super().__init__()
        self.config = config
        shape = (config.heads, 2, config.keys_per_side, config.tucker_rank, config.rank_key_dim)
        self.weight = nn.Parameter(torch.empty(shape))
        self.norm = build_norm(config.qk_norm, config.key_dim, eps)

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of every key.

        query: (T, Q, 2, Dk), normalised. Returns row and column scores, each (H, R, T, N), in the
        dtype of the query. Head i reads query i * Q // H.
        """
        heads, sides, keys, ranks, width = self.weight.shape
        # With split ranks the slices of one key are normalised together, over Dk.
        normed = self.norm(self.weight.reshape(heads, sides, keys, -1, self.config.key_dim))
        keys_by_rank = normed.view(heads, sides, keys, ranks, width).permute(1, 0, 3, 4, 2)
        query_by_rank = self._per_head_and_rank(query)  # (2, H, R, T, K)
        scores = query_by_rank @ keys_by_rank
        return scores[0], scores[1]

    def _per_head_and_rank(self, query: Tensor) -> Tensor:
        heads, _, _, ranks, width = self.weight.shape
        tokens, queries = query.shape[:2]
        if self.config.rank_layout == "split":
            by_rank = query.view(tokens, queries, 2, ranks, width)
        else:
            by_rank = query.unsqueeze(3).expand(tokens, queries, 2, ranks, width)
        per_head = by_rank.repeat_interleave(heads // queries, dim=1)
        return per_head.permute(2, 1, 3, 0, 4)
