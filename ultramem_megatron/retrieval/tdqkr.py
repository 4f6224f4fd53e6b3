"""Tucker-decomposed query-key retrieval with multi-core scoring (paper 3.3, 3.5; eq. 4-10, 16-17).

T tokens, H heads, R Tucker rank, C cores, N keys per side, m top-m.
"""

import torch
from torch import Tensor, nn

from ultramem_megatron.config import UltraMemConfig
from ultramem_megatron.retrieval.keys import ProductKeys
from ultramem_megatron.retrieval.retrieved import (
    Retrieved,
    at_least_float32,
    best_of_grid,
    by_token,
    pick,
)
from ultramem_megatron.retrieval.tucker_core import TuckerCores


class TuckerRetrieval(nn.Module):
    """Shortlist each side by the rank-1 filter, then score the m x m candidates exactly.

    The filter's (u, t) are the buffers of `cores`; whoever trains the layer updates them after
    each optimizer step, evaluation uses the last ones.
    """

    def __init__(self, config: UltraMemConfig, eps: float) -> None:
        super().__init__()
        self.config = config
        self.keys = ProductKeys(config, eps)
        self.cores = TuckerCores(config)

    def forward(self, query: Tensor) -> Retrieved:
        """query: (T, Q, 2, Dk)."""
        row_scores, column_scores = self.keys(query)  # (H, R, T, N)
        row_keys = self._shortlist(row_scores, self.cores.u)
        column_keys = self._shortlist(column_scores, self.cores.t)
        row, column = pick(row_scores, row_keys), pick(column_scores, column_keys)
        grids = self._grids(row, column)  # (C, H, T, m, m)
        positions, addresses = best_of_grid(
            grids.sum(0), row_keys, column_keys, self.config.keys_per_side
        )
        scores = grids.flatten(-2).gather(-1, positions.expand(len(grids), *positions.shape))
        return Retrieved(by_token(addresses), by_token(scores.permute(1, 2, 3, 0)))

    @torch.no_grad()
    def _shortlist(self, scores: Tensor, direction: Tensor) -> Tensor:
        """Keys with the m largest merged scores; scores (H, R, T, N), direction (H, R)."""
        merged = torch.einsum(
            "hrtn,hr->htn", at_least_float32(scores), direction.to(at_least_float32(scores).dtype)
        )
        return merged.topk(self.config.topk, dim=-1).indices

    def _grids(self, row: Tensor, column: Tensor) -> Tensor:
        """G_c[i, j] = sum_ab row[a, i] C_c[a, b] column[b, j]; row, column: (H, R, T, m)."""
        cores = self.cores().to(row.dtype)
        half = torch.einsum("hati,chab->chtib", row, cores)
        return torch.einsum("chtib,hbtj->chtij", half, column)
