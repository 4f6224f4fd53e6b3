"""The whole table on every rank: no exchange. What the other partitions must equal."""

from dataclasses import dataclass

from torch import Tensor

from ultramem_megatron.communication.pausing import Pausing
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.kernels.lookup_dot import lookup_dot
from ultramem_megatron.kernels.lookup_prevalued import lookup_prevalued
from ultramem_megatron.kernels.lookup_reduce import lookup_addresses
from ultramem_megatron.memory.retrieval.addresses import split_address
from ultramem_megatron.memory.tables.contract import Partition, PreValues
from ultramem_megatron.memory.tables.layout import TableLayout
from ultramem_megatron.memory.tables.traffic import Exchange, Volume


@dataclass(frozen=True)
class ReplicatedReader:
    """Reads this rank's own, whole table."""

    num_values: int
    num_groups: int
    pauses = 0
    prevalued_pauses = 0
    dot_pauses = 0

    def read(
        self, part: Tensor, addresses: Tensor, scores: Tensor, pre: PreValues | None = None
    ) -> Pausing:
        """See TableReader.read."""
        yield from ()
        if pre is None:
            return lookup_addresses(part, addresses, scores, self.num_groups)
        rows, groups = split_address(addresses, self.num_values)
        return lookup_prevalued(
            part, pre.part, rows, groups, scores, pre.x, self.num_groups, pre.act
        )

    def dot(self, part: Tensor, addresses: Tensor, x: Tensor) -> Pausing:
        """See ColumnsReader.dot."""
        yield from ()
        return lookup_dot(part, split_address(addresses, self.num_values)[0], x)


def _check(layout: TableLayout) -> None:
    if layout.size > 1:
        raise UltraMemError(f"A whole table is not shared, but {layout.size} ranks were given.")


def _reader(
    layout: TableLayout, num_groups: int, _group: object, _exchange: Exchange
) -> ReplicatedReader:
    return ReplicatedReader(layout.num_values, num_groups)


PARTITION = Partition(
    name="replicated",
    parts=lambda size, _node: (size, 1),
    check=_check,
    reader=_reader,
    volume=lambda _: Volume(0.0, 0.0),
    kept=lambda _: 0.0,
)
