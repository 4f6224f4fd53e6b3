"""Where a memory stands: the layer it reads at, the layer it adds after, the values it reads."""

from typing import NamedTuple

from ultramem_megatron.memory.config import UltraMemConfig


class Placement(NamedTuple):
    """Of one memory; layers are counted from 1.

    table: number of the layer after which the values are named; memories with the same one share
    them.
    """

    reads: int
    adds: int
    table: int


def placements(config: UltraMemConfig) -> tuple[Placement, ...]:
    """Of every memory of a model, in the order of layers: each span has values of its own."""
    return tuple(Placement(span.start, span.end, span.start) for span in config.spans)
