"""What every kind of values offers a memory layer, and how it is listed.

T tokens, D hidden, P picks per token, C cores, E expansion groups, V value dim, N values.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ultramem_megatron.communication.pausing import Pausing
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.initialization.draws import Draw
from ultramem_megatron.memory.initialization.scales import Scales


class Values(Protocol):
    """A module with one or several value tables (`ValueTable`), cut over the same ranks.

    Tables may be shared by several memories; what else it has is this memory's own.
    """

    @property
    def weight(self) -> Tensor:
        """(This rank's part of) the values themselves, N x V."""
        ...

    @property
    def pauses(self) -> int:
        """How often a read pauses for other ranks."""
        ...

    def __call__(self, addresses: Tensor, scores: Tensor, x: Tensor) -> Pausing:
        """(T, E, V) for addresses (T, P), group * N + row, scores (T, P, C), inputs (..., D)."""
        ...

    def serve(self) -> bool:
        """With tables read in lockstep: take part in others' reads; False if all have finished."""
        ...

    def reset(self, draw: Draw, scales: Scales) -> None:
        """Initial values of the tables."""
        ...

    def reset_own(self, draw: Draw, scales: Scales) -> None:
        """Initial values of what is not shared."""
        ...


@dataclass(frozen=True)
class Site:
    """Where values stand.

    hidden_size: D. cut: how the tables are cut, over which ranks, what ValueTable takes after its
    config. shared: the values of another memory, whose tables these read.
    """

    hidden_size: int
    cut: tuple[str, Any, int | None] = ("replicated", None, None)
    shared: Any = None


@dataclass(frozen=True)
class ValuesKind:
    """One kind of values in the list.

    name: the flag's value. build: of a config and a site. reference: the plain form, of rows,
    groups (T, P) and scores (T, P, C), inputs (T, D), the layer's state dict and the config, to
    (T, E, V).
    """

    name: str
    build: Callable[[UltraMemConfig, Site], Any]
    reference: Callable[
        [Tensor, Tensor, Tensor, Tensor, Mapping[str, Tensor], UltraMemConfig], Tensor
    ]
