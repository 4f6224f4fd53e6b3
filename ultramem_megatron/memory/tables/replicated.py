"""The whole table on every rank: no exchange. What the other partitions must equal."""

from dataclasses import dataclass

from torch import Tensor

from ultramem_megatron.communication.pausing import Pausing
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.kernels.lookup_dot import lookup_dot
from ultramem_megatron.kernels.lookup_reduce import lookup_addresses
from ultramem_megatron.memory.retrieval.addresses import split_address
from ultramem_megatron.memory.tables.contract import Partition
from ultramem_megatron.memory.tables.layout import TableLayout
from ultramem_megatron.memory.tables.traffic import Exchange, Volume


@dataclass(frozen=True)
class ReplicatedReader:
    """Reads this rank's own, whole table."""

    num_values: int
    num_groups: int
    pauses = 0
    dot_pauses = 0

    def read(self, part: Tensor, addresses: Tensor, scores: Tensor) -> Pausing:
        """See TableReader.read."""
        yield from ()
        return lookup_addresses(part, addresses, scores, self.num_groups)

    def dot(self, part: Tensor, addresses: Tensor, x: Tensor) -> Pausing:
        """See TableReader.dot."""
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
