"""How many ranks share a table where nothing says: all, until there are many; then the fastest.

Among few ranks a table over all of them is least on each, and cheap to read. Among many, reads cost
more with every node, and tables over some ranks, replicated over the rest, cost a reduction of
their gradients once a step: the cost model weighs the two.
"""

from dataclasses import dataclass, replace

from ultramem_megatron.memory.tables.contract import Partition
from ultramem_megatron.memory.tables.partitions import PARTITIONS
from ultramem_megatron.memory.tables.traffic import Exchange, seconds_per_token

ALL_UP_TO = 64
"""Ranks of a stage up to which all of them share a table."""
MOST_BYTES = 8e9
"""Of tables on a rank that is not one of all: a tenth of an H100's memory."""


@dataclass(frozen=True)
class Step:
    """What a step does with the tables of a pipeline stage.

    ranks: of the stage. reads: tokens of a rank, times the memories that each is read by. elements:
    of all tables. moved_bytes: of an element's gradient and of its parameter, which go to and come
    from those who train it. held_bytes: of an element with its gradient and optimizer state.
    """

    ranks: int
    reads: float
    elements: int
    moved_bytes: float
    held_bytes: float


def default_size(x: Exchange, num_values: int, step: Step) -> int:
    """P of the fastest step, of those that divide the stage and leave room; x: of any size."""
    if step.ranks <= ALL_UP_TO:
        return step.ranks
    seconds = {step.ranks: float("inf")}
    for size in (p for p in range(1, step.ranks + 1) if step.ranks % p == 0):
        at = replace(x, size=size)
        fitting = [kind for kind in PARTITIONS.values() if kind.fits(at, num_values)]
        if fitting and _has_room(step, size):
            seconds[size] = _seconds(at, fitting, step)
    return min(seconds, key=lambda size: (seconds[size], -size))


def _has_room(step: Step, size: int) -> bool:
    return size == step.ranks or step.elements / size * step.held_bytes <= MOST_BYTES


def _seconds(x: Exchange, fitting: list[Partition], step: Step) -> float:
    """Of a step's reads, and of the reduction over the replicas, which are on other nodes."""
    reading = min(seconds_per_token(kind.volume(x), x) for kind in fitting)
    away = step.elements / x.size * (1 - x.size / step.ranks)
    return step.reads * reading + away * step.moved_bytes / x.network_bandwidth
