"""Where a memory stands: the layer it reads at, the layer it adds after, the values it reads."""

from typing import NamedTuple

from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.sharing import first_value, owner
from ultramem_megatron.memory.spans import Span


class Placement(NamedTuple):
    """Of one memory; layers are counted from 1.

    table: number of the layer after which the values are named; memories with the same one share
    them. first_value: row of that table at which this memory's own begin.
    """

    reads: int
    adds: int
    table: int
    first_value: int = 0


def uncut(config: UltraMemConfig) -> tuple[Span, ...]:
    """What is best kept on one pipeline stage: spans, and from a table's first reader to its last.

    Spans can be cut, at a price; tables cannot.
    """
    return (*config.spans, *(group for group in table_groups(config) if group.start < group.end))


def table_groups(config: UltraMemConfig) -> tuple[Span, ...]:
    """For each table, the layers in which its first and its last reader read it."""
    readers: dict[int, list[int]] = {}
    for place in placements(config):
        readers.setdefault(place.table, []).append(place.reads)
    return tuple(Span(layers[0], layers[-1]) for layers in readers.values())


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
