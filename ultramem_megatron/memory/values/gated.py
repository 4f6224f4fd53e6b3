"""Pooled values times a gate of the input, silu(W_1 x): Memory+ (arXiv 2412.09764)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultramem_megatron.communication.pausing import Pausing
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.initialization.draws import Draw
from ultramem_megatron.memory.initialization.scales import Scales
from ultramem_megatron.memory.modules import Linear, zero_bias
from ultramem_megatron.memory.tables.value_table import ValueTable
from ultramem_megatron.memory.values.contract import Site, ValuesKind
from ultramem_megatron.memory.values.pooled import pooled_reference


class GatedValues(nn.Module):
    """A table, and this memory's own gate D -> V, one for all expansion groups."""

    def __init__(self, config: UltraMemConfig, site: Site) -> None:
        super().__init__()
        self.table = site.shared.table if site.shared else ValueTable(config, *site.cut)
        self.gate = Linear(site.hidden_size, config.value_dim, bias=config.projection_bias)

    @property
    def weight(self) -> Tensor:
        """See Values."""
        return self.table.weight

    @property
    def pauses(self) -> int:
        """See Values."""
        return self.table.pauses

    def forward(self, addresses: Tensor, scores: Tensor, x: Tensor) -> Pausing:
        """See Values."""
        pooled = yield from self.table(addresses, scores)
        return pooled * F.silu(self.gate(x.flatten(0, -2))).unsqueeze(1)

    def serve(self) -> bool:
        """See Values."""
        return self.table.serve()

    def reset(self, draw: Draw, scales: Scales) -> None:
        """See Values."""
        self.table.draw(draw, scales.values, "values")

    @torch.no_grad()
    def reset_own(self, draw: Draw, scales: Scales) -> None:
        """See Values."""
        draw.normal_(self.gate.weight, self.gate.in_features**-0.5, "gate")
        zero_bias(self.gate)


def _reference(
    rows: Tensor,
    groups: Tensor,
    scores: Tensor,
    x: Tensor,
    state: Mapping[str, Tensor],
    config: UltraMemConfig,
) -> Tensor:
    gate = x @ state["values.gate.weight"].T + state.get("values.gate.bias", 0)
    pooled = pooled_reference(rows, groups, scores, state["values.table.weight"], config)
    return pooled * (gate / (1 + (-gate).exp()))[:, None]


KIND = ValuesKind(name="gated", build=GatedValues, reference=_reference)
