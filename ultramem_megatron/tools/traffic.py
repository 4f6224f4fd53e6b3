"""Bytes that each partition of a value table moves, by the number of ranks that share it.

    ultramem traffic --topk 84 --value-dim 1024

The formulas are those by which `--ultramem-partition auto` chooses, each beside its reader in
memory/tables. With the paper's own `ultramem paper figure9` draws where both move the same.
"""

import argparse
from collections.abc import Sequence

from ultramem_megatron.errors import CommandParser, UltraMemError, exit_on_user_error
from ultramem_megatron.memory.tables.traffic import Exchange


def table(x: Exchange, sizes: Sequence[int]) -> str:
    """One line per group size: bytes per token and the verdict."""
    # Imported here: --help needs no torch.
    from ultramem_megatron.memory.tables import dimension_wise, number_wise
    from ultramem_megatron.memory.tables.partitions import choose

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
        volumes = (
            dimension_wise.volume(at),
            number_wise.volume_of_rows(at),
            number_wise.volume_of_sums(at),
        )
        cells = [f"{volume.forward:11.0f} {volume.backward:11.0f}" for volume in volumes]
        lines.append(f"{size:>5} | " + " | ".join(cells) + f" | {choose(at)}")
    return "\n".join(lines)


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
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table. Raises UltraMemError for sizes below one."""
    options = _parser().parse_args(argv)
    for name in ("topk", "value_dim", "value_expansion", "cores", "number_bytes", "ranks_per_node"):
        if getattr(options, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise UltraMemError(f"{flag} is {getattr(options, name)}; it must be at least 1.")
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
    )
    print(table(exchange, options.sizes))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
