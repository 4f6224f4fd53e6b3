"""Tucker-decomposed query-key retrieval with multi-core scoring (paper 3.3, 3.5; eq. 4-17)."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.kernels.tucker_topk import tucker_topk
from ultramem_megatron.memory.config import UltraMemConfig, flag
from ultramem_megatron.memory.initialization.draws import Draw
from ultramem_megatron.memory.initialization.scales import Scales
from ultramem_megatron.memory.retrieval.contract import Grids, Retrieval, RetrievalKind
from ultramem_megatron.memory.retrieval.filter_recall import filter_recall
from ultramem_megatron.memory.retrieval.retrieved import Retrieved
from ultramem_megatron.memory.retrieval.tucker_core import TuckerCores, singular_value_penalty

_REPORTS = ("lambda 1", "lambda 2", "aux loss")


class TuckerRetrieval(Retrieval):
    """Shortlist each side by the rank-1 filter, then score the m x m candidates exactly.

    The filter's (u, t) are the buffers of `cores`; whoever trains the layer updates them after
    each optimizer step, evaluation uses the last ones.
    """

    score_power = 2.0

    def __init__(self, config: UltraMemConfig, eps: float) -> None:
        super().__init__(config, eps)
        self.cores = TuckerCores(config)

    def forward(self, query: Tensor) -> Retrieved:
        """query: (T, Q, 2, Dk)."""
        return self._best(query, None)

    def shuffled(self, query: Tensor, tables: Tensor) -> Retrieved:
        """See Retrieval.shuffled."""
        return self._best(query, tables)

    def _best(self, query: Tensor, shuffle: Tensor | None) -> Retrieved:
        config, cores = self.config, self.cores()
        keys, scores = self.keys(query, self.cores.directions(), config.shortlist)
        best = tucker_topk(scores, keys, cores, config.keys_per_side, config.topk, shuffle=shuffle)
        return Retrieved.by_head(*best)

    def fix(self) -> None:
        """See Retrieval.fix."""
        super().fix()
        self.cores.fix()

    def reset(self, draw: Draw, scales: Scales) -> None:
        """See Retrieval.reset."""
        super().reset(draw, scales)
        self.cores.reset(draw, scales)

    def after_step(self) -> None:
        """Bring the rank-1 filter up to date with the cores."""
        self.cores(update_filter=True)

    def penalty(self) -> Tensor | None:
        """alpha * penalty on the cores' small singular values (eq. 11-12)."""
        if not self._is_penalised:
            return None
        return self._penalty(self.cores.singular_values())

    def recall(self, query: Tensor) -> Tensor:
        """See Retrieval.recall and filter_recall.py."""
        scores, core = self.keys.scores(query), self.cores.total()
        return filter_recall(scores, self.cores.directions(), core, self.config.shortlist)

    def report(self) -> dict[str, float]:
        """Leading singular values of the summed cores, mean over heads, and the weighted penalty.

        All of the filter's last update: after an optimizer step parameters may not have been
        gathered yet.
        """
        spectrum = self.cores.spectrum
        if spectrum is None:
            return dict.fromkeys(_REPORTS, math.nan)
        first, second = [*spectrum.mean(0).tolist(), math.nan][:2]
        weighted = float(self._penalty(spectrum)) if self.config.aux_loss_weight else math.nan
        return dict(zip(_REPORTS, (first, second, weighted), strict=True))

    @property
    def _is_penalised(self) -> bool:
        return self.config.aux_loss_weight != 0 and self.config.tucker_rank > 1

    def _penalty(self, singular_values: Tensor) -> Tensor:
        penalty = singular_value_penalty(singular_values, self.config.aux_loss_margin)
        return self.config.aux_loss_weight * penalty


def _check(config: UltraMemConfig) -> None:
    if config.rank_layout == "split" and config.key_dim % config.tucker_rank:
        raise UltraMemError(
            f"{flag('key_dim')} is {config.key_dim}, not divisible by {flag('tucker_rank')} "
            f"{config.tucker_rank}. Use a multiple of {config.tucker_rank}, or "
            f"{flag('rank_layout')} full."
        )


def _reference(
    row: Tensor, column: Tensor, head: int, state: Mapping[str, Tensor], config: UltraMemConfig
) -> Grids:
    topk, ranks = config.shortlist, config.tucker_rank
    u, t = state["retrieval.cores.u"][head], state["retrieval.cores.t"][head]
    rows = torch.einsum("tan,a->tn", row, u).topk(topk).indices  # eq. 8: rank-1 filter
    columns = torch.einsum("tan,a->tn", column, t).topk(topk).indices
    row_m = row.gather(2, rows[:, None].expand(-1, ranks, -1))
    column_m = column.gather(2, columns[:, None].expand(-1, ranks, -1))
    # eq. 9 and 16: exact scores of the m x m candidates, one grid per core
    cores = state["retrieval.cores.weight"]
    return rows, columns, [row_m.transpose(1, 2) @ core[head] @ column_m for core in cores]


KIND = RetrievalKind(
    name="tdqkr", build=TuckerRetrieval, check=_check, reference=_reference, reports=_REPORTS
)
