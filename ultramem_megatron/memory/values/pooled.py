"""Values pooled by their scores: the paper's (eq. 3, 15 and 17)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ultramem_megatron.communication.pausing import Pausing
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.initialization.draws import Draw
from ultramem_megatron.memory.initialization.scales import Scales
from ultramem_megatron.memory.tables.value_table import ValueTable
from ultramem_megatron.memory.values.contract import Site, ValuesKind


class PooledValues(ValueTable):
    """Sums of scores times values, one for each expansion group."""

    def forward(self, addresses: Tensor, scores: Tensor, x: Tensor | None = None) -> Pausing:
        """See Values; x is not looked at."""
        return self.read(addresses, scores)

    def reset(self, draw: Draw, scales: Scales) -> None:
        """Initial values."""
        self.draw(draw, scales.values, "values")

    def reset_own(self, draw: Draw, scales: Scales) -> None:
        """There is nothing but the table."""


def _build(config: UltraMemConfig, site: Site) -> Any:
    return site.shared or PooledValues(config, *site.cut)


def pooled_reference(
    rows: Tensor, groups: Tensor, scores: Tensor, table: Tensor, config: UltraMemConfig
) -> Tensor:
    """Plain sums (T, E, V) for rows, groups (T, P) and scores (T, P, C), one head or all."""
    # eq. 17: slice i of a value is weighted by the score of core i.
    weights = scores.repeat_interleave(config.value_dim // config.cores, dim=2)
    weighted = table[rows] * weights
    pooled = []
    for group in range(config.value_expansion):  # eq. 15: pool per group, project later
        in_group = (groups == group).unsqueeze(-1)
        pooled.append((weighted * in_group).sum(1))
    return torch.stack(pooled, dim=1)


def _reference(
    rows: Tensor,
    groups: Tensor,
    scores: Tensor,
    _x: Tensor,
    state: Mapping[str, Tensor],
    config: UltraMemConfig,
) -> Tensor:
    return pooled_reference(rows, groups, scores, state["values.weight"], config)


KIND = ValuesKind(name="pooled", build=_build, reference=_reference)
