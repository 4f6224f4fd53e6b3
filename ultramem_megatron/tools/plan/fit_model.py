"""A cost model of a training step: seconds and bytes of a rank, for one layout on one machine.

Matrices take their FLOPs over what a GPU reaches of its peak, the lookup and the optimizer their
bytes over its memory's bandwidth, exchanges their bytes over the links, in a node or beyond. What
else runs at the same time is not known to the model, but for --ultramem-overlap and
--overlap-grad-reduce. Nothing is measured.
"""

from dataclasses import dataclass

from ultramem_megatron.memory.config import UltraMemConfig


@dataclass(frozen=True)
class Machine:
    """gpus: of the world. memory: bytes of one. Rates per second: FLOPs as reached, bytes."""

    gpus: int
    memory: float
    node: int
    node_bandwidth: float
    network_bandwidth: float
    flops: float
    memory_bandwidth: float

    def link(self, ranks: int) -> float:
        """Bytes/s of a rank within so many neighbours."""
        return self.node_bandwidth if ranks <= self.node else self.network_bandwidth


@dataclass(frozen=True)
class Work:
    """What a step does, whatever the layout."""

    sequences: int
    """Global batch size."""
    length: int
    """Tokens of a sequence."""
    hidden: int
    number_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    cached: int
    """Numbers of keys and values of a token, all layers."""
    memory: UltraMemConfig | None
    gradients_overlap: bool


@dataclass(frozen=True)
class Layout:
    """Sizes of groups, and how tables are cut. stages: their numbers of layers."""

    tensor: int
    stages: tuple[int, ...]
    context: int
    data: int
    tables: int = 1
    partition: str = "replicated"
    recompute: bool = False
    micro_batch: int = 1
    node_size: int | None = None
    """Of the partitions that look at nodes."""

    @property
    def stage_ranks(self) -> int:
        """Ranks of a stage."""
        return self.tensor * self.context * self.data


@dataclass(frozen=True)
class Prediction:
    """Of the slowest stage, a step's seconds by cause; memory: bytes of the fullest rank."""

    layout: Layout
    memory: float
    compute: float
    tables: float
    optimizer: float
    communication: float
    hidden: float
    """Of the tables' exchange, what --ultramem-overlap hides; it is in `communication`."""

    @property
    def seconds(self) -> float:
        """Of a step, with --ultramem-overlap."""
        return self.compute + self.tables + self.optimizer + self.communication - self.hidden

    @property
    def bound(self) -> str:
        """What takes longest."""
        causes = {
            "compute": self.compute,
            "table traffic": self.tables,
            "optimizer": self.optimizer,
            "communication": self.communication - self.hidden,
        }
        return max(causes, key=causes.__getitem__)
