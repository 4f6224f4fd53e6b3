"""Bytes that each partition moves, and the choice between them; `ultramem traffic` prints them.

All volumes are bytes that one rank receives from others per token of its own, in one memory layer,
for uniform use of the values. The paper's formulas (section 4, appendix D) leave out the value
expansion: pooled values come home as E vectors, not one. Here they are counted.

P ranks, M picks per token (m*H), Dv value dim, E expansion, h cores, b bytes per number.
"""

from dataclasses import dataclass
from typing import NamedTuple

from ultramem_megatron.memory.tables.layout import dimension_wise_fits

ADDRESS_BYTES = 4  # int32


class Volume(NamedTuple):
    """Bytes received per token, forward and backward."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Forward and backward together."""
        return self.forward + self.backward


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
    number_bytes: int = 2
    """b: bytes of a score or of an element of a value (bf16: 2)."""
    ranks_per_node: int = 8
    node_bandwidth: float = 350e9
    """bytes/s between ranks of a node (NVLink of an H100, as achieved by all-to-all)."""
    network_bandwidth: float = 45e9
    """bytes/s of one rank to other nodes (400 Gb/s InfiniBand)."""


def dimension_wise(x: Exchange) -> Volume:
    """Addresses and scores of all tokens come in, pooled slices go home."""
    others = x.size - 1
    cores = max(1, x.cores // x.size)  # cores whose columns one rank holds
    addresses = ADDRESS_BYTES * x.picks * others
    scores = x.number_bytes * cores * x.picks * others
    pooled = x.number_bytes * x.expansion * x.value_dim * others / x.size
    return Volume(addresses + scores + pooled, scores + pooled)


def number_wise_rows(x: Exchange) -> Volume:
    """Addresses go to the owners, rows come back."""
    away = (x.size - 1) / x.size
    addresses = ADDRESS_BYTES * x.picks * away
    rows = x.number_bytes * x.picks * x.value_dim * away
    return Volume(addresses + rows, rows)


def number_wise_sums(x: Exchange) -> Volume:
    """Addresses and scores go to the owners, one sum per owner and group comes back."""
    away = (x.size - 1) / x.size
    addresses = 2 * ADDRESS_BYTES * x.picks * away  # the row, and the number of its sum
    scores = x.number_bytes * x.cores * x.picks * away
    sums = x.number_bytes * x.value_dim * distinct(x.size * x.expansion, x.picks) * away
    return Volume(addresses + scores + sums, scores + sums)


def number_wise(x: Exchange) -> Volume:
    """The cheaper of the two ways to bring values home."""
    return min(number_wise_rows(x), number_wise_sums(x), key=lambda volume: volume.total)


def pools_at_owner(x: Exchange) -> bool:
    """Whether sums move fewer bytes than rows."""
    return number_wise_sums(x).total < number_wise_rows(x).total


def distinct(buckets: int, draws: int) -> float:
    """Expected number of different buckets in `draws` uniform draws."""
    return buckets * (1 - (1 - 1 / buckets) ** draws)


def seconds_per_token(volume: Volume, x: Exchange) -> float:
    """Transfer time if bytes spread evenly over the other ranks, in the node and beyond."""
    if x.size == 1:
        return 0.0
    inside = min(x.ranks_per_node, x.size) - 1
    share_inside = inside / (x.size - 1)
    return volume.total * (
        share_inside / x.node_bandwidth + (1 - share_inside) / x.network_bandwidth
    )


def choose(x: Exchange) -> str:
    """ "dimension" or "number": the cheaper of those that the sizes allow."""
    if not dimension_wise_fits(x.value_dim, x.cores, x.size):
        return "number"
    cheaper = seconds_per_token(dimension_wise(x), x) <= seconds_per_token(number_wise(x), x)
    return "dimension" if cheaper else "number"


def paper_crossover(size: int, picks: int) -> float:
    """Value dim above which dimension-wise moves less, by the paper's own formulas (figure 9).

    v* = M(3P-2)/(M-1): 84 picks give 22 for 8 ranks, 192 for 64, 775 for 256.
    """
    return picks * (3 * size - 2) / (picks - 1)
