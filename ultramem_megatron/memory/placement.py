"""Where a memory stands: the layer it reads at, the layer it adds after, the values it reads."""

from typing import NamedTuple

from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.sharing import first_value, owner


class Placement(NamedTuple):
    """Of one memory; layers are counted from 1.

    table: number of the layer after which the values are named; memories with the same one share
    them. first_value: row of that table at which this memory's own begin.
    """

    reads: int
    adds: int
    table: int
    first_value: int = 0


def placements(config: UltraMemConfig) -> tuple[Placement, ...]:
    """Of every memory of a model, in the order of layers."""
    return tuple(
        Placement(
            span.start,
            span.end,
            config.spans[owner(config, number)].start,
            first_value(config, number),
        )
        for number, span in enumerate(config.spans)
    )
