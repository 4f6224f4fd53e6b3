"""Product-key retrieval (PKM): additive scores over two sides, the baseline (paper eq. 1-3)."""

import torch
from torch import Tensor, nn

from ultramem_megatron.kernels.tucker_topk import tucker_topk
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.retrieval.keys import ProductKeys
from ultramem_megatron.memory.retrieval.retrieved import Retrieved


class ProductKeyRetrieval(nn.Module):
    """score(i, j) = <K_row[i], q_row> + <K_col[j], q_col>; the m x m shortlist is exact."""

    def __init__(self, config: UltraMemConfig, eps: float) -> None:
        super().__init__()
        self.config = config
        self.keys = ProductKeys(config, eps)

    def forward(self, query: Tensor) -> Retrieved:
        """query: (T, Q, 2, Dk)."""
        heads = self.config.heads
        directions = query.new_ones(2, heads, 1)
        keys, scores = self.keys(query, directions, self.config.topk)
        row, column = scores.unbind(2)  # (T, H, 1, m)
        # A sum as a Tucker grid: (row, 1) and (1, column) of rank 2 with the identity as core.
        ones = torch.ones_like(row)
        of_rank_2 = torch.stack([torch.cat([row, ones], 2), torch.cat([ones, column], 2)], dim=2)
        core = torch.eye(2, dtype=scores.dtype, device=scores.device).expand(1, heads, 2, 2)
        return Retrieved.by_head(*tucker_topk(of_rank_2, keys, core, self.config.keys_per_side))
