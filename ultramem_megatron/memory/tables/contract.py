"""What every partition of a value table offers, and how it is listed.

T tokens of this rank, P picks per token (H*m), C cores, E expansion groups, V value dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.nn.functional import pad

from ultramem_megatron.communication.pausing import Pausing
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.tables.layout import TableLayout
from ultramem_megatron.memory.tables.traffic import Exchange, Volume


class PreValues(NamedTuple):
    """What scores are multiplied by: act(<P[row], x>), for each pick of a token.

    part: this rank's part of the pre-values P, cut as the values, with one core. x: (T, Dp). act: a
    function's name, see `activation`. stored: a StoredTable with the rows, if they are
    not in `part`.
    """

    part: Tensor
    x: Tensor
    act: str
    stored: Any = None

    def padded(self, missing: int) -> "PreValues":
        """With so many more tokens, of zeros."""
        return self._replace(x=pad(self.x, (0, 0, 0, missing)))


class TableReader(Protocol):
    """Reads a table that may be spread over ranks. All ranks take part in each call."""

    @property
    def pauses(self) -> int:
        """How often a read pauses for the other ranks."""
        ...

    @property
    def prevalued_pauses(self) -> int:
        """How often a read behind pre-values does."""
        ...

    def read(
        self, part: Tensor, addresses: Tensor, scores: Tensor, pre: PreValues | None = None
    ) -> Pausing:
        """Pooled values of this rank's tokens, differentiable in what is floating; in steps.

        part: this rank's part of the table, `TableLayout.shape`. addresses: (T, P) int64, shuffled
        virtual addresses, group * N + row. scores: (T, P, C), to be multiplied by what `pre` gives
        for the same rows, if there is any. Returns (T, E, V) in the table's dtype, the same for
        every partition up to the order of summation.
        """
        ...


class ColumnsReader(TableReader, Protocol):
    """Reads tables of which this rank, or a group of ranks, has some columns."""

    @property
    def dot_pauses(self) -> int:
        """How often a dot pauses for the other ranks."""
        ...

    def dot(self, part: Tensor, addresses: Tensor, x: Tensor) -> Pausing:
        """Products (T, P) of the rows at these addresses with their token's x (T, V); in steps.

        As for `read`; the table has one core. At least float32, differentiable in part and x.
        """
        ...


@dataclass(frozen=True)
class Partition:
    """One way to cut a table, in the list.

    name: the flag's value. parts: row and column parts for P ranks, so many of them in a node;
    raises UltraMemError for numbers that it cannot lay out. check: raises UltraMemError for a
    layout that cannot be read so. reader: of a layout with so many expansion groups, over a process
    group, exchanging what the cost model's view says. volume: bytes that a read moves.
    kept: bytes of a token, beyond what a whole table takes, that wait for its backward.
    waits_for_host: whether a read lets the host wait for the device, as no CUDA graph can.
    """

    name: str
    parts: Callable[[int, int], tuple[int, int]]
    check: Callable[[TableLayout], None]
    reader: Callable[[TableLayout, int, Any, Exchange], TableReader]
    volume: Callable[[Exchange], Volume]
    kept: Callable[[Exchange], float]
    waits_for_host: bool = False

    def layout(
        self,
        num_values: int,
        value_dim: int,
        cores: int,
        size: int = 1,
        rank: int = 0,
        *,
        node: int = 1,
    ) -> TableLayout:
        """The part of one of `size` ranks, of which each `node` neighbours share fast links."""
        return TableLayout(num_values, value_dim, cores, *self.parts(size, node), rank)

    def fits(self, x: Exchange, num_values: int) -> bool:
        """Whether a table of these sizes can be cut so."""
        try:
            self.check(self.layout(num_values, x.value_dim, x.cores, x.size, node=x.ranks_per_node))
            if x.pre_dim:
                self.check(self.layout(num_values, x.pre_dim, 1, x.size, node=x.ranks_per_node))
        except UltraMemError:
            return False
        return True
