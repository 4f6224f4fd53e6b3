"""Values behind pre-values: each score is multiplied by a pre-value's product with the input.

d = act(<P[row], W_p x>), and what is read is the sum of s * d * V[row] (UltraMemV2, arXiv
2508.18756). Without projections (W_p = 1) and with GELU these are PEER's experts of one neuron
(arXiv 2407.04153).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ultramem_megatron.communication.pausing import Pausing
from ultramem_megatron.kernels.lookup_prevalued.activations import activation
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.initialization.draws import Draw
from ultramem_megatron.memory.initialization.scales import Scales
from ultramem_megatron.memory.modules import Linear
from ultramem_megatron.memory.tables.value_table import PreValueTable, ValueTable
from ultramem_megatron.memory.values.contract import Site, ValuesKind
from ultramem_megatron.memory.values.pooled import pooled_reference


class PreValuedValues(nn.Module):
    """A table of values and one of pre-values, each N rows, and the projection D -> Dp."""

    def __init__(self, config: UltraMemConfig, site: Site) -> None:
        super().__init__()
        shared = site.shared
        self.table = shared.table if shared else ValueTable(config, *site.cut)
        self.pre_table = (
            shared.pre_table
            if shared
            else PreValueTable(config, *site.cut, width=config.pre_dim, cores=1)
        )
        self.pre_proj: nn.Module = (
            Linear(site.hidden_size, config.pre_dim, bias=False)
            if config.value_projection
            else nn.Identity()
        )
        self.act = config.pre_value_activation

    @property
    def weight(self) -> Tensor:
        """See Values."""
        return self.table.weight

    @property
    def pauses(self) -> int:
        """See Values."""
        return self.table.prevalued_pauses

    def forward(self, addresses: Tensor, scores: Tensor, x: Tensor) -> Pausing:
        """See Values."""
        pre = self.pre_table(self.pre_proj(x.flatten(0, -2)), self.act)
        return (yield from self.table(addresses, scores, pre))

    def serve(self) -> bool:
        """See Values."""
        weight = self.pre_table.weight
        no_token = weight.new_empty(0, self.pre_table.layout.value_dim)
        return self.table.serve(self.pre_table(no_token, self.act))

    def reset(self, draw: Draw, scales: Scales) -> None:
        """See Values."""
        self.table.draw(draw, scales.values, "values")
        self.pre_table.draw(draw, scales.pre_values, "pre_values")

    @torch.no_grad()
    def reset_own(self, draw: Draw, scales: Scales) -> None:
        """See Values."""
        if isinstance(self.pre_proj, Linear):
            draw.normal_(self.pre_proj.weight, scales.pre_projection, "pre_proj")


def _reference(
    rows: Tensor,
    groups: Tensor,
    scores: Tensor,
    x: Tensor,
    state: Mapping[str, Tensor],
    config: UltraMemConfig,
) -> Tensor:
    if config.value_projection:
        x = x @ state["values.pre_proj.weight"].T
    dots = (state["values.pre_table.weight"][rows] * x[:, None]).sum(-1)
    weights = scores * activation(config.pre_value_activation)(dots)[:, :, None]
    return pooled_reference(rows, groups, weights, state["values.table.weight"], config)


KIND = ValuesKind(name="prevalued", build=PreValuedValues, reference=_reference)
