"""The physical value table: this rank's part of it, and reading it."""

from typing import Any

import torch
from torch import Tensor, nn

from ultramem_megatron.communication.pausing import Steps
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.initialization.draws import Draw
from ultramem_megatron.memory.tables.contract import TableReader
from ultramem_megatron.memory.tables.dimension_wise import DimensionWiseReader
from ultramem_megatron.memory.tables.layout import TableLayout
from ultramem_megatron.memory.tables.lockstep import LockstepReader
from ultramem_megatron.memory.tables.number_wise import NumberWiseReader
from ultramem_megatron.memory.tables.replicated import ReplicatedReader
from ultramem_megatron.memory.tables.settings import exchange_of
from ultramem_megatron.memory.tables.shared_tokens import SharedTokensReader
from ultramem_megatron.memory.tables.traffic import pools_at_owner

VALUES_TAG = "ultramem_values"
"""Attribute of a value table's parameter, by which the optimizer gives it a rate of its own."""


class ValueTable(nn.Module):
    """N values of width Dv, of which this rank allocates its part only; tagged `VALUES_TAG`."""

    def __init__(
        self, config: UltraMemConfig, layout: TableLayout | None = None, group: Any = None
    ) -> None:
        """layout: this rank's part, by default everything. group: ranks that share the table."""
        super().__init__()
        self.layout = layout or TableLayout(
            "replicated", config.num_values, config.value_dim, config.cores
        )
        self.weight = nn.Parameter(torch.empty(self.layout.shape))
        mark_as_values(self.weight)
        self._config, self._group = config, group
        self._reader = _reader(self.layout, config, group, self.weight.element_size())

    @property
    def pauses(self) -> int:
        """How often a read pauses for other ranks."""
        return self._reader.pauses

    def forward(self, addresses: Tensor, scores: Tensor) -> Steps:
        """Pooled values (T, E, Dv) for shuffled virtual addresses (T, P) and scores (T, P, C)."""
        return self._reader.read(self.weight, addresses, scores)

    @torch.no_grad()
    def reset(self, draw: Draw, std: float) -> None:
        """Initial values of this rank's part."""
        layout = self.layout
        draw.table_(self.weight, layout.rows(), layout.columns(), layout.value_dim, std, "values")

    def share_tokens(self, group: Any) -> None:
        """The ranks of `group` hold the same tokens: let each read a share of them."""
        self._reader = SharedTokensReader(self._reader, group)

    def read_in_lockstep(self) -> None:
        """Let ranks of the group bring different numbers of tokens, or none; for inference."""
        self._reader = LockstepReader(self._reader, self._group)

    def serve(self) -> bool:
        """In lockstep: take part in one read of the other ranks; False if all have finished."""
        assert isinstance(self._reader, LockstepReader)
        config = self._config
        return self._reader.serve(self.weight, config.heads * config.topk, config.cores)


def _reader(
    layout: TableLayout, config: UltraMemConfig, group: Any, number_bytes: int
) -> TableReader:
    expansion = config.value_expansion
    if layout.size == 1:
        return ReplicatedReader(layout.num_values, expansion)
    if layout.partition == "dimension":
        return DimensionWiseReader(layout, expansion, group)
    pool = pools_at_owner(exchange_of(config, layout.size, number_bytes))
    return NumberWiseReader(layout, expansion, group, pool)


def mark_as_values(parameter: nn.Parameter) -> None:
    """Tag a parameter as a value table."""
    setattr(parameter, VALUES_TAG, True)


def is_value_table(parameter: Tensor) -> bool:
    """Whether a parameter is (a part of) a value table."""
    return bool(getattr(parameter, VALUES_TAG, False))
