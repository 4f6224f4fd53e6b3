"""Product-key retrieval (PKM): additive scores over two sides, the baseline (paper eq. 1-3)."""

import torch
from torch import Tensor, nn

from ultramem_megatron.config import UltraMemConfig
from ultramem_megatron.retrieval.keys import ProductKeys
from ultramem_megatron.retrieval.retrieved import Retrieved, best_of_grid, by_token, pick


class ProductKeyRetrieval(nn.Module):
    """score(i, j) = <K_row[i], q_row> + <K_col[j], q_col>; the m x m shortlist is exact."""

    def __init__(self, config: UltraMemConfig, eps: float) -> None:
        super().__init__()
        self.config = config
        self.keys = ProductKeys(config, eps)

    def forward(self, query: Tensor) -> Retrieved:
        """query: (T, Q, 2, Dk)."""
        row_scores, column_scores = self.keys(query)
        with torch.no_grad():
            row_keys = row_scores[:, 0].topk(self.config.topk, dim=-1).indices
            column_keys = column_scores[:, 0].topk(self.config.topk, dim=-1).indices
        row = pick(row_scores, row_keys)[:, 0]
        column = pick(column_scores, column_keys)[:, 0]
        grid = row.unsqueeze(-1) + column.unsqueeze(-2)
        positions, addresses = best_of_grid(grid, row_keys, column_keys, self.config.keys_per_side)
        scores = grid.flatten(-2).gather(-1, positions)
        return Retrieved(by_token(addresses), by_token(scores.unsqueeze(-1)))
