"""One stage of a layout: bytes that a rank of it holds, seconds that its work takes."""

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

from ultramem_megatron.memory.tables.partitions import PARTITIONS
from ultramem_megatron.memory.tables.settings import exchange_of
from ultramem_megatron.memory.tables.traffic import Exchange, seconds_per_token
from ultramem_megatron.tools.plan.fit_counts import Counts, LayerCount
from ultramem_megatron.tools.plan.fit_model import Layout, Machine, Prediction, Work


class Held(NamedTuple):
    """What is on a stage."""

    place: int
    """Of the stage."""
    layers: range
    """From 0."""
    total: LayerCount
    """Of the layers together."""
    largest_kept: int
    """Bytes that one of them keeps."""
    memories: tuple[int, ...]
    """Of each memory, the layers that it can run beside; 0: of none."""


@functools.cache
def differing_stages(counts: Counts, work: Work, sizes: tuple[int, ...]) -> tuple[Held, ...]:
    """Of stages with the same contents the first, where most micro-batches are in flight."""
    found: dict[object, Held] = {}
    start = 0
    for place, size in enumerate(sizes):
        layers = range(start, start + size)
        start += size
        total = sum((counts.layers[number] for number in layers), LayerCount())
        spans = work.memory.spans if work.memory else ()
        ends = [(s.start - 1, min(s.end - 1, layers[-1])) for s in spans if s.start - 1 in layers]
        beside = tuple(last - first + 1 if last > first else 0 for first, last in ends)
        outer = (place == 0, place == len(sizes) - 1)
        largest = max(counts.layers[number].kept for number in layers)
        found.setdefault((total, beside, outer), Held(place, layers, total, largest, beside))
    return tuple(found.values())


@dataclass(frozen=True)
class Stage:
    """A stage's costs; seconds are of one micro-batch, forward and backward, if not said else."""

    counts: Counts
    work: Work
    machine: Machine
    layout: Layout
    held: Held

    @property
    def is_first(self) -> bool:
        """Whether it holds the embeddings."""
        return self.held.place == 0

    @property
    def is_last(self) -> bool:
        """Whether it holds the output layer."""
        return self.held.place == len(self.layout.stages) - 1

    @property
    def tokens(self) -> float:
        """Of a micro-batch, those that a memory on this rank sees."""
        layout = self.layout
        return self.work.length * layout.micro_batch / layout.context / layout.tensor

    @property
    def micro_batches(self) -> int:
        """Of a step."""
        return self.work.sequences // (self.layout.micro_batch * self.layout.data)

    @property
    def dense(self) -> int:
        """Parameters on a rank, without tables."""
        ends = self.is_first * self.counts.before.dense + self.is_last * self.counts.after.dense
        return self.held.total.dense + ends

    @property
    def table(self) -> float:
        """Elements of tables on a rank."""
        return self.held.total.tables / self.layout.tables

    @property
    def trained(self) -> float:
        """Parameters whose optimizer state is on a rank: the distributed optimizer's share."""
        layout = self.layout
        dense = self.dense / (layout.data * layout.context)
        return dense + self.table / (layout.stage_ranks / layout.tables)

    def bytes_held(self) -> float:
        """Parameters, gradients, optimizer, activations."""
        work = self.work
        own = (self.dense + self.table) * (work.number_bytes + work.gradient_bytes)
        flying = min(len(self.layout.stages) - self.held.place, self.micro_batches)
        return own + self.trained * work.optimizer_bytes + self._kept(flying)

    def _kept(self, flying: int) -> float:
        """Bytes for the backward of so many micro-batches."""
        layout, held = self.layout, self.held
        share = layout.micro_batch / layout.context
        head = self.counts.after.kept * share * self.is_last
        exchanged = self._kept_of_exchange()
        if not layout.recompute:
            return (held.total.kept * share + exchanged * len(held.memories)) * flying + head
        inputs = len(held.layers) * self.tokens * self.work.hidden * self.work.number_bytes
        # Beside the inputs of all layers, the one that is computed again.
        return inputs * flying + held.largest_kept * share + exchanged + head

    def _kept_of_exchange(self) -> float:
        """Of one memory, what its exchange keeps."""
        layout = self.layout
        if self.work.memory is None or layout.tables == 1:
            return 0.0
        exchange = _exchange(self.work, self.machine, layout.tables)
        return self.tokens * PARTITIONS[layout.partition].kept(exchange)

    def compute(self) -> float:
        """Of matrices, and of causal attention, which sees half a sequence."""
        work, layout, total = self.work, self.layout, self.held.total
        attended = len(self.held.layers) * work.length * work.hidden / layout.tensor
        sharded = total.sharded + self.is_last * self.counts.after.sharded
        each = 2 * (sharded + attended) * layout.tensor
        each += 2 * (total.whole + self.is_last * self.counts.after.whole)
        return (4 if layout.recompute else 3) * each * self.tokens / self.machine.flops

    def table_traffic(self) -> float:
        """Of reading rows, in the backward once more, and adding to their gradients."""
        config, work = self.work.memory, self.work
        if config is None:
            return 0.0
        each = (3 if self.layout.recompute else 2) * work.number_bytes + 2 * work.gradient_bytes
        rows = len(self.held.memories) * self.tokens * config.picks
        return rows * sum(config.row_widths) * each / self.machine.memory_bandwidth

    def table_exchange(self) -> float:
        """Of what ranks that share a table send each other."""
        if self.work.memory is None or self.layout.tables == 1:
            return 0.0
        layout = self.layout
        each = _exchange_of_token(
            self.work, self.machine, layout.tables, layout.partition, layout.recompute
        )
        return len(self.held.memories) * self.tokens * each

    def hidden(self) -> float:
        """Of that, what goes on beside the layers of the spans."""
        if self.layout.recompute:  # layer by layer: a branch ends with its layer
            return 0.0
        beside = sum(self.held.memories) / len(self.held.layers)
        return min(self.table_exchange(), min(1.0, beside) * self.compute())

    def other_exchange(self) -> float:
        """Of tensor, context and pipeline parallelism."""
        layout, work, machine = self.layout, self.work, self.machine
        share = len(self.held.layers) / len(self.counts.layers)
        tensor = self.counts.received * layout.micro_batch / layout.context * share
        tensor *= 1.5 if layout.recompute else 1.0
        keys = 3 * (layout.context - 1) * self.tokens * work.cached * work.number_bytes * share
        boundaries = 2 - self.is_first - self.is_last
        states = boundaries * self.tokens * work.hidden * work.number_bytes
        return (
            tensor / machine.link(layout.tensor)
            + keys / machine.link(layout.tensor * layout.context)
            + states / machine.link(2 * layout.stage_ranks)
        )

    def seconds(self) -> float:
        """All of a micro-batch."""
        local = self.compute() + self.table_traffic()
        return local + self.table_exchange() - self.hidden() + self.other_exchange()

    def reduction(self) -> float:
        """Once a step: gradients to those who train them, parameters back."""
        work, layout = self.work, self.layout
        replicas, tables = layout.data * layout.context, layout.stage_ranks / layout.tables
        away = self.dense * (1 - 1 / replicas) + self.table * (1 - 1 / tables)
        taken = away * (work.gradient_bytes + work.number_bytes)
        taken /= self.machine.link(layout.stage_ranks)
        # The backward is two thirds of the last micro-batch.
        return max(0.0, taken - self.compute() * 2 / 3) if work.gradients_overlap else taken

    def optimizer(self) -> float:
        """Once a step: gradients zeroed, their norm, and Adam, which reads and writes all."""
        work = self.work
        zeroed = (self.dense + self.table) * work.gradient_bytes
        each = 2 * (work.optimizer_bytes + work.number_bytes + work.gradient_bytes)
        return (zeroed + self.trained * each) / self.machine.memory_bandwidth


def predict(counts: Counts, work: Work, machine: Machine, layout: Layout) -> Prediction:
    """A step of the layout: seconds of its slowest stage, bytes of its fullest."""
    stages = [
        Stage(counts, work, machine, layout, held)
        for held in differing_stages(counts, work, layout.stages)
    ]
    slowest = max(stages, key=Stage.seconds)
    passes = slowest.micro_batches + len(layout.stages) - 1  # until the pipeline has run dry
    exchanged = passes * (slowest.table_exchange() + slowest.other_exchange())
    return Prediction(
        layout,
        memory=max(stage.bytes_held() for stage in stages),
        compute=passes * slowest.compute(),
        tables=passes * slowest.table_traffic(),
        optimizer=max(stage.optimizer() for stage in stages),
        communication=exchanged + max(stage.reduction() for stage in stages),
        hidden=passes * slowest.hidden(),
    )


@functools.cache
def _exchange_of_token(
    work: Work, machine: Machine, tables: int, partition: str, recompute: bool
) -> float:
    """Seconds of one memory's exchange, of each token of a rank."""
    exchange = _exchange(work, machine, tables)
    volume = PARTITIONS[partition].volume(exchange)
    if recompute:
        volume = volume.with_recomputation()
    return seconds_per_token(volume, exchange)


def _exchange(work: Work, machine: Machine, tables: int) -> Exchange:
    """What the ranks of a table exchange, over the machine's links."""
    assert work.memory is not None
    return replace(
        exchange_of(work.memory, tables, work.number_bytes, machine.node),
        node_bandwidth=machine.node_bandwidth,
        network_bandwidth=machine.network_bandwidth,
    )
