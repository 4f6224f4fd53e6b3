"""Product-key retrieval (PKM): additive scores over two sides, the baseline (paper eq. 1-3)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.kernels.tucker_topk import tucker_topk
from ultramem_megatron.memory.config import UltraMemConfig, flag
from ultramem_megatron.memory.retrieval.contract import Grids, Retrieval, RetrievalKind
from ultramem_megatron.memory.retrieval.retrieved import Retrieved


class ProductKeyRetrieval(Retrieval):
    """score(i, j) = <K_row[i], q_row> + <K_col[j], q_col>; the m x m shortlist is exact."""

    score_power = 1.0

    def forward(self, query: Tensor) -> Retrieved:
        """query: (T, Q, 2, Dk)."""
        config, heads = self.config, self.config.heads
        directions = query.new_ones(2, heads, 1)
        keys, scores = self.keys(query, directions, config.shortlist)
        row, column = scores.unbind(2)  # (T, H, 1, m)
        # A sum as a Tucker grid: (row, 1) and (1, column) of rank 2 with the identity as core.
        ones = torch.ones_like(row)
        of_rank_2 = torch.stack([torch.cat([row, ones], 2), torch.cat([ones, column], 2)], dim=2)
        core = torch.eye(2, dtype=scores.dtype, device=scores.device).expand(1, heads, 2, 2)
        best = tucker_topk(of_rank_2, keys, core, config.keys_per_side, config.topk)
        return Retrieved.by_head(*best)


def _check(config: UltraMemConfig) -> None:
    if (config.tucker_rank, config.cores) != (1, 1):
        raise UltraMemError(
            f"{flag('retrieval')} pkm has no Tucker cores: {flag('tucker_rank')} is "
            f"{config.tucker_rank} and {flag('cores')} is {config.cores}; both must be 1."
        )


def _reference(
    row: Tensor, column: Tensor, _head: int, _state: Mapping[str, Tensor], config: UltraMemConfig
) -> Grids:
    topk = config.shortlist
    rows, columns = row[:, 0].topk(topk).indices, column[:, 0].topk(topk).indices
    grid = row[:, 0].gather(1, rows)[:, :, None] + column[:, 0].gather(1, columns)[:, None]
    return rows, columns, [grid]


KIND = RetrievalKind(
    name="pkm",
    build=ProductKeyRetrieval,
    check=_check,
    reference=_reference,
    defaults={"tucker_rank": 1, "cores": 1},
)
