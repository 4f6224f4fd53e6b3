"""The physical value table: this rank's part of it, and reading it."""

import contextlib
import re
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ultramem_megatron.communication.node_groups import node_groups
from ultramem_megatron.communication.pausing import Pausing
from ultramem_megatron.kernels.native.large_pages import ask_for_large_pages
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.initialization.draws import Draw
from ultramem_megatron.memory.tables.contract import PreValues, TableReader
from ultramem_megatron.memory.tables.host_rows import HostRows
from ultramem_megatron.memory.tables.lockstep import LockstepReader
from ultramem_megatron.memory.tables.settings import TableSettings, exchange_of
from ultramem_megatron.memory.tables.shared_tokens import SharedTokensReader
from ultramem_megatron.memory.tables.stored import StoredReader, StoredTable

VALUES_TAG = "ultramem_values"
"""Attribute of a value table's parameter, by which the optimizer gives it a rate of its own."""

_without_rows: ContextVar[bool] = ContextVar("tables are built without their rows", default=False)
_in_host_memory: ContextVar[bool] = ContextVar("tables are built in host memory", default=False)

_TABLE_NAME = re.compile(
    r"\b(pre_)?values\.((pre_)?table\.)?weight$|^decoder\.ultramem\.(pre_)?values$"
)


class ValueTable(nn.Module):
    """N values of width Dv, of which this rank allocates its part only; tagged `VALUES_TAG`."""

    def __init__(
        self,
        config: UltraMemConfig,
        partition: str = "replicated",
        group: Any = None,
        node_size: int | None = None,
        *,
        width: int | None = None,
        cores: int | None = None,
    ) -> None:
        """group: ranks that share the table, None: this one. partition: how, of PARTITIONS.

        node_size: of TableSettings. width, cores: of a row, and scores for it; by default Dv and
        those of the config.
        """
        super().__init__()
        size, rank = (1, 0) if group is None else (group.size(), group.rank())
        settings = TableSettings(size, partition, node_size)
        self.layout = settings.layout(config, rank, width=width, cores=cores)
        rows, columns = self.layout.shape
        on_host = _in_host_memory.get() and not torch.empty(0).is_meta
        empty = torch.empty(
            0 if _without_rows.get() else rows, columns, device="cpu" if on_host else None
        )
        ask_for_large_pages(empty)
        self.weight = nn.Parameter(empty, requires_grad=not on_host)
        self.rows: HostRows | None = None
        if on_host:
            self.stand_in = nn.Parameter(torch.zeros(1, 1, dtype=torch.float32))
            self.rows = HostRows(self.weight, self.stand_in)
        self.stored: StoredTable | None = None
        mark_as_values(self.trained)
        self._config, self._group = config, group
        exchange = exchange_of(config, size, self.weight.element_size(), node_size)
        self._reader: TableReader = settings.kind.reader(
            self.layout, config.value_expansion, group, exchange
        )

    @property
    def trained(self) -> nn.Parameter:
        """What a wrapper and an optimizer are to see: the weight, or what stands for it."""
        return self.weight if self.rows is None else self.stand_in

    @property
    def part(self) -> Tensor:
        """What a reader is given: the weight, or what stands for it where it is read."""
        return self.weight if self.rows is None else self.rows.part()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Let a table in host memory stay there; only what stands for it moves, in float32."""
        if self.rows is None:
            return super()._apply(fn, recurse)
        dtype = fn(self.weight.data[:0]).dtype
        self.weight.data = self.weight.data.to(dtype)
        self.stand_in.data = fn(self.stand_in.data).float()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}stand_in", None)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.rows is not None:
            state.setdefault(f"{prefix}stand_in", self.stand_in.detach())
        super()._load_from_state_dict(state, prefix, *args)

    @property
    def column_ranks(self) -> Any:
        """The group of ranks that have other columns of this one's rows; None: it has all."""
        if self.layout.column_parts == 1:
            return None
        rows = self.layout.row_parts
        return self._group if rows == 1 else node_groups(self._group, rows).across

    @property
    def pauses(self) -> int:
        """How often a read pauses for other ranks."""
        return self._reader.pauses

    @property
    def prevalued_pauses(self) -> int:
        """How often a read behind pre-values pauses for other ranks."""
        return self._reader.prevalued_pauses

    def forward(self, addresses: Tensor, scores: Tensor, pre: Any = None) -> Pausing:
        """As read. Who reads calls the module, for which Megatron's parameter gather waits."""
        return self.read(addresses, scores, pre)

    def read(self, addresses: Tensor, scores: Tensor, pre: PreValues | None = None) -> Pausing:
        """Pooled values (T, E, Dv) for addresses (T, P), group * N + row, and scores (T, P, C).

        pre: what scores are multiplied by.
        """
        return self._reader.read(self.part, addresses, scores, pre)

    @torch.no_grad()
    def draw(self, draw: Draw, std: float, name: str) -> None:
        """Fill this rank's part from a normal distribution; `name` tells a layer's tables apart."""
        layout = self.layout
        if len(self.weight):
            draw.table_(self.weight, layout.rows(), layout.columns(), layout.value_dim, std, name)

    def share_tokens(self, group: Any) -> None:
        """The ranks of `group` hold the same tokens: let each read a share of them."""
        self._reader = SharedTokensReader(self._reader, group)

    def read_in_lockstep(self) -> None:
        """Let ranks of the group bring different numbers of tokens, or none; for inference."""
        self._reader = LockstepReader(self._reader, self._group)

    def leave_stored(self, table: StoredTable) -> None:
        """Fetch rows from there; of a whole table that was built `without_rows`, for inference."""
        self.stored = table
        self._reader = StoredReader(table, self.layout.num_values, self._config.value_expansion)

    def serve(self, pre: PreValues | None = None) -> bool:
        """In lockstep: take part in one read of the other ranks; False if all have finished."""
        assert isinstance(self._reader, LockstepReader)
        config = self._config
        return self._reader.serve(self.part, config.picks, config.cores, pre)


class PreValueTable(ValueTable):
    """N pre-values, which are read together with the values they stand before."""

    def forward(self, x: Tensor, act: str) -> PreValues:  # type: ignore[override]  # reads nothing
        """For inputs (T, Dp). Called before the read, for the sake of Megatron's gather as well."""
        return PreValues(self.part, x, act, self.stored)

    def leave_stored(self, table: StoredTable) -> None:
        """See ValueTable.leave_stored."""
        self.stored = table


@contextlib.contextmanager
def without_rows() -> Iterator[None]:
    """Tables that are built within it allocate and draw no rows, which are elsewhere."""
    before = _without_rows.set(True)
    try:
        yield
    finally:
        _without_rows.reset(before)


@contextlib.contextmanager
def in_host_memory() -> Iterator[None]:
    """Tables that are built within it, to be trained, lie in host memory (host_rows.py)."""
    before = _in_host_memory.set(True)
    try:
        yield
    finally:
        _in_host_memory.reset(before)


def mark_as_values(parameter: nn.Parameter) -> None:
    """Tag a parameter as a value table."""
    setattr(parameter, VALUES_TAG, True)


def is_value_table(parameter: Tensor) -> bool:
    """Whether a parameter is (a part of) a value table."""
    return bool(getattr(parameter, VALUES_TAG, False))


def names_a_table(name: str) -> bool:
    """Whether this is the name of a value table in a model, or in a checkpoint."""
    return _TABLE_NAME.search(name) is not None


def value_tables(module: nn.Module) -> dict[str, ValueTable]:
    """The value tables in a module, by the names of their modules."""
    return {name: m for name, m in module.named_modules() if isinstance(m, ValueTable)}
