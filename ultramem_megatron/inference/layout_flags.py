"""The flags of commands that decode which say how the ranks of a torchrun share the model."""

import argparse
from typing import TYPE_CHECKING

from ultramem_megatron.errors import UltraMemError

if TYPE_CHECKING:  # imported where it is used: --help needs no torch
    from ultramem_megatron.inference.layout import InferenceLayout

TABLE_MEMORIES = ("device", "host", "disk")


def add_layout_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say how the ranks of a torchrun share the model."""
    parser.add_argument(
        "--tensor-model-parallel-size",
        "--tensor-parallel-size",
        type=int,
        dest="tensor_parallel_size",
        metavar="T",
        help="Ranks that share each weight. Default: all. (The short name goes with the next "
        "release.)",
    )
    parser.add_argument(
        "--ultramem-parallel-size",
        type=int,
        metavar="P",
        help="Ranks that share each value table. Default: all (with experts, those of one tensor-"
        "parallel group).",
    )
    parser.add_argument(
        "--ultramem-partition",
        default="auto",
        metavar="NAME",
        help="How they share it, as in training (ultramem flags has the names). Default: auto, by "
        "bytes moved.",
    )
    parser.add_argument(
        "--ultramem-node-size",
        type=int,
        metavar="N",
        help="Neighbours that share fast links, as in training. Default: the ranks of a host.",
    )
    parser.add_argument(
        "--table-memory",
        choices=TABLE_MEMORIES,
        default="device",
        help="Where value tables are: on the device (default), in the host's memory, or on disk, "
        "in the checkpoint's own files. From the last two only rows that are read come to the "
        "device; --ultramem-parallel-size is 1 then.",
    )
    parser.add_argument(
        "--table-cache-rows",
        type=int,
        metavar="N",
        help="Of each table that --table-memory leaves in the host's memory or on disk, keep the N "
        "rows that are read most on the device; says at the end how often they were read.",
    )
    parser.add_argument(
        "--table-format",
        choices=("int8", "fp8"),
        help="With --table-memory host: keep value tables in 8 bits, decoded where they are read.",
    )
    parser.add_argument(
        "--table-block",
        type=int,
        metavar="N",
        help="Values of a row that have a scale of --table-format in common. Default: all.",
    )


def layout_from(options: argparse.Namespace) -> "InferenceLayout":
    """The layout those flags ask for. Raises UltraMemError for what cannot be."""
    from ultramem_megatron.inference.layout import InferenceLayout
    from ultramem_megatron.memory.tables.partitions import shared_partitions

    allowed = ("auto", *shared_partitions())
    if options.ultramem_partition not in allowed:
        raise UltraMemError(
            f"--ultramem-partition is {options.ultramem_partition}; it must be one of "
            f"{', '.join(allowed)}."
        )
    _check_cache(options)
    _check_format(options)
    return InferenceLayout(
        options.tensor_parallel_size,
        options.ultramem_parallel_size,
        options.ultramem_partition,
        options.table_memory,
        options.ultramem_node_size,
        options.table_cache_rows or 0,
        options.table_format,
        options.table_block,
    )


def _check_cache(options: argparse.Namespace) -> None:
    rows = options.table_cache_rows
    if rows is None:
        return
    if rows < 1:
        raise UltraMemError(f"--table-cache-rows is {rows}; it must be a whole number >= 1.")
    if options.table_memory == "device":
        raise UltraMemError(
            f"--table-cache-rows {rows}: tables are on the device already. Leave it out, or give "
            f"--table-memory host or disk."
        )


def _check_format(options: argparse.Namespace) -> None:
    if options.table_format and options.table_memory != "host":
        raise UltraMemError(
            f"--table-format {options.table_format}: of tables in the host's memory alone, and "
            f"--table-memory is {options.table_memory}. Give --table-memory host, or leave it out."
        )
    if options.table_block is not None and not options.table_format:
        raise UltraMemError(
            f"--table-block {options.table_block}: there are no scales. Give --table-format int8 "
            f"or fp8, or leave it out."
        )
