"""Bytes that each partition moves, the choice between them, and the paper's figure 9.

    ultramem traffic --topk 84 --value-dim 1024     # table
    ultramem traffic --plot figure9.png             # figure 9

All volumes are bytes that one rank receives from others per token of its own, in one memory layer,
for uniform use of the values. The paper's formulas (section 4, appendix D) leave out the value
expansion: pooled values come home as E vectors, not one. Here they are counted.

P ranks, M picks per token (m*H), Dv value dim, E expansion, h cores, b bytes per number.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.tables.layout import dimension_wise_fits

ADDRESS_BYTES = 4  # int32
SIZE_BYTES = 8  # int64, number-wise: how many entries go to each rank


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


def table(x: Exchange, sizes: Sequence[int]) -> str:
    """One line per group size: bytes per token and the verdict."""
    lines = [
        f"bytes per token and layer: M={x.picks} picks, Dv={x.value_dim}, E={x.expansion}, "
        f"h={x.cores}, {x.number_bytes} bytes per number",
        f"{'P':>5}"
        + "".join(
            f" | {name:^23}"
            for name in ("dimension-wise", "number-wise, rows", "number-wise, sums")
        )
        + " |",
        " " * 5 + (" | " + f"{'forward':>11} {'backward':>11}") * 3 + " | cheaper",
    ]
    for size in sizes:
        at = Exchange(**{**x.__dict__, "size": size})
        volumes = dimension_wise(at), number_wise_rows(at), number_wise_sums(at)
        cells = [f"{volume.forward:11.0f} {volume.backward:11.0f}" for volume in volumes]
        lines.append(f"{size:>5} | " + " | ".join(cells) + f" | {choose(at)}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ultramem traffic",
                                     description=__doc__.split("\n")[0])  # fmt: skip
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64, 128, 256, 512], help="P")
    add("--topk", type=int, default=84, help="picks per token over all heads, m*H (default 84)")
    add("--value-dim", type=int, default=1024, help="Dv (default 1024)")
    add("--value-expansion", type=int, default=4, help="E (default 4)")
    add("--cores", type=int, default=2, help="h (default 2)")
    add("--number-bytes", type=int, default=2, help="bytes per score and element (default 2: bf16)")
    add("--ranks-per-node", type=int, default=8, help="(default 8)")
    add("--plot", type=Path, help="also draw the paper's figure 9 into this file")
    add("--csv", type=Path, help="also write the numbers of figure 9 into this file")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; draw the figure if asked to."""
    options = _parser().parse_args(argv)
    for name in ("topk", "value_dim", "value_expansion", "cores", "number_bytes", "ranks_per_node"):
        if getattr(options, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise UltraMemError(f"{flag} is {getattr(options, name)}; it must be at least 1.")
    if min(options.sizes) < 1:
        raise UltraMemError(f"--sizes has {min(options.sizes)}; sizes must be at least 1.")
    exchange = Exchange(
        size=1, picks=options.topk, value_dim=options.value_dim, cores=options.cores,
        expansion=options.value_expansion, number_bytes=options.number_bytes,
        ranks_per_node=options.ranks_per_node,
    )  # fmt: skip
    print(table(exchange, options.sizes))
    from ultramem_megatron.tools.paper import figure9  # which computes with this file

    if options.plot:
        figure9.draw(options.plot, figure9.equal_traffic())
        print(f"figure 9: {options.plot}")
    if options.csv:
        figure9.write_csv(options.csv)
        print(f"numbers of figure 9: {options.csv}")


if __name__ == "__main__":
    try:
        main()
    except UltraMemError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
