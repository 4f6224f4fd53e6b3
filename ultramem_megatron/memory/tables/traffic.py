"""What the reads of a table are measured by: bytes that move, and the seconds they take.

Each partition's own formula stands beside its reader; `ultramem traffic` prints them.

All volumes are bytes that one rank receives from others per token of its own, in one memory layer,
for uniform use of the values. The paper's formulas (section 4, appendix D) leave out the value
expansion: pooled values come home as E vectors, not one. Here they are counted.

P ranks, M picks per token (m*H), Dv value dim, E expansion, h cores, b bytes per number.
"""

from dataclasses import dataclass
from typing import NamedTuple

ROW_BYTES = 4  # int32: of a row of one rank, or of the number of a sum
PRODUCT_BYTES = 4  # float32: of a pre-value and its token's input


class Volume(NamedTuple):
    """Bytes received per token, forward and backward."""

    forward: float
    backward: float
    near: tuple[float, float] | None = None
    """Of these, forward and backward, from ranks of the same node; None: from all ranks alike."""

    @property
    def total(self) -> float:
        """Forward and backward together."""
        return self.forward + self.backward

    def with_recomputation(self) -> "Volume":
        """The forward twice."""
        near = None if self.near is None else (2 * self.near[0], self.near[1])
        return Volume(2 * self.forward, self.backward, near)


@dataclass(frozen=True)
class Exchange:
    """What is exchanged, and over what."""

    size: int
    """P: ranks that share a table."""
    picks: int
    """M = m*H: values read per token."""
    value_dim: int
    expansion: int = 4
    cores: int = 2
    pre_dim: int = 0
    """Dp: width of a pre-value, 0: there are none."""
    number_bytes: int = 2
    """b: bytes of a score or of an element of a value (bf16: 2)."""
    address_bytes: int = 4
    """Of an address where columns are shared, see `address_bytes`."""
    ranks_per_node: int = 8
    node_bandwidth: float = 350e9
    """bytes/s between ranks of a node (NVLink of an H100, as achieved by all-to-all)."""
    network_bandwidth: float = 45e9
    """bytes/s of one rank to other nodes (400 Gb/s InfiniBand)."""


def address_bytes(virtual_values: int) -> int:
    """Bytes in which an address, group * N + row, travels: E*N of them are possible."""
    return 4 if virtual_values <= 2**31 else 8


def distinct(buckets: int, draws: int) -> float:
    """Expected number of different buckets in `draws` uniform draws."""
    return buckets * (1 - (1 - 1 / buckets) ** draws)


def seconds_per_token(volume: Volume, x: Exchange) -> float:
    """Transfer time over the links in the node and those beyond, one after the other."""
    if x.size == 1:
        return 0.0
    if volume.near is None:
        near = volume.total * (min(x.ranks_per_node, x.size) - 1) / (x.size - 1)
    else:
        near = sum(volume.near)
    return near / x.node_bandwidth + (volume.total - near) / x.network_bandwidth


def paper_crossover(size: int, picks: int) -> float:
    """Value dim above which dimension-wise moves less, by the paper's own formulas (figure 9).

    v* = M(3P-2)/(M-1): 84 picks give 22 for 8 ranks, 192 for 64, 775 for 256.
    """
    return picks * (3 * size - 2) / (picks - 1)
