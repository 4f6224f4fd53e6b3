"""Bytes that each partition of a value table moves, by the number of ranks that share it.

    ultramem traffic --topk 84 --value-dim 1024

The formulas are those by which `--ultramem-partition auto` chooses, each beside its reader in
memory/tables. With the paper's own `ultramem paper figure9` draws where both move the same.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from ultramem_megatron.errors import CommandParser, UltraMemError, exit_on_user_error
from ultramem_megatron.memory.tables.traffic import Exchange

_NONE = f"{'-':>9} {'-':>9}"
"""Where sizes do not allow a partition."""


def table(x: Exchange, sizes: Sequence[int]) -> str:
    """One line per group size: bytes per token and the verdict, by the seconds they take."""
    from ultramem_megatron.memory.tables.partitions import choose  # here: --help needs no torch

    names = ("dimension-wise", "number-wise, rows", "number-wise, sums")
    lines = [
        f"bytes per token and layer: M={x.picks} picks, Dv={x.value_dim}, E={x.expansion}, "
        f"h={x.cores}, {x.number_bytes} bytes per number, {x.ranks_per_node} ranks in a node",
        f"{'P':>5}" + "".join(f" | {name:^19}" for name in (*names, "grid")) + " |",
        " " * 5
        + (" | " + f"{'forward':>9} {'backward':>9}") * 3
        + f" | {'node':>9} {'network':>9} | fastest",
    ]
    for size in sizes:
        at = replace(x, size=size)
        cells = [*_evenly_spread(at), _grid_cell(at)]
        lines.append(f"{size:>5} | " + " | ".join([*cells, choose(at)]))
    return "\n".join(lines)


def _evenly_spread(x: Exchange) -> list[str]:
    """Bytes forward and backward where all ranks are asked alike."""
    from ultramem_megatron.memory.tables import dimension_wise, number_wise

    formulas = {
        "dimension": (dimension_wise.volume,),
        "number": (number_wise.volume_of_rows, number_wise.volume_of_sums),
    }
    cells = []
    for name, volumes in formulas.items():
        for volume in (formula(x) for formula in volumes):
            cells.append(_cell(volume.forward, volume.backward) if _fits(name, x) else _NONE)
    return cells


def _grid_cell(x: Exchange) -> str:
    """Bytes of the grid, forward and backward together, in the node and over the network."""
    from ultramem_megatron.memory.tables.partitions import PARTITIONS

    if x.size <= x.ranks_per_node or not _fits("grid", x):  # in one node it is another partition
        return _NONE
    volume = PARTITIONS["grid"].volume(x)
    near = sum(volume.near or ())
    return _cell(near, volume.total - near)


def _fits(name: str, x: Exchange) -> bool:
    """Whether a table of enough rows can be cut so."""
    from ultramem_megatron.memory.tables.partitions import PARTITIONS

    return PARTITIONS[name].fits(x, x.size)


def _cell(first: float, second: float) -> str:
    return f"{first:9.0f} {second:9.0f}"


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="ultramem traffic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64, 128, 256, 512], help="P")
    add("--topk", type=int, default=84, help="picks per token over all heads, m*H (default 84)")
    add("--value-dim", type=int, default=1024, help="Dv (default 1024)")
    add("--value-expansion", type=int, default=4, help="E (default 4)")
    add("--cores", type=int, default=2, help="h (default 2)")
    add("--number-bytes", type=int, default=2, help="bytes per score and element (default 2: bf16)")
    add("--ranks-per-node", type=int, default=8, help="(default 8)")
    add(
        "--bandwidth",
        type=float,
        nargs=2,
        metavar=("NODE", "NETWORK"),
        default=(350.0, 45.0),
        help="GB/s of a rank to others in its node, and to other nodes (default 350 45)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table. Raises UltraMemError for sizes below one."""
    options = _parser().parse_args(argv)
    for name in ("topk", "value_dim", "value_expansion", "cores", "number_bytes", "ranks_per_node"):
        if getattr(options, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise UltraMemError(f"{flag} is {getattr(options, name)}; it must be at least 1.")
    if options.value_dim % options.cores:
        raise UltraMemError(
            f"--value-dim {options.value_dim} is not divisible by --cores {options.cores}, each of "
            f"which has a slice of it. Use a multiple."
        )
    if not min(options.bandwidth) > 0:
        raise UltraMemError(f"--bandwidth has {min(options.bandwidth):g}; it must be above 0.")
    if min(options.sizes) < 1:
        raise UltraMemError(f"--sizes has {min(options.sizes)}; sizes must be at least 1.")
    exchange = Exchange(
        size=1,
        picks=options.topk,
        value_dim=options.value_dim,
        cores=options.cores,
        expansion=options.value_expansion,
        number_bytes=options.number_bytes,
        ranks_per_node=options.ranks_per_node,
        node_bandwidth=options.bandwidth[0] * 1e9,
        network_bandwidth=options.bandwidth[1] * 1e9,
    )
    print(table(exchange, options.sizes))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
