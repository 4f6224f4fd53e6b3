"""The flags of commands that decode which say how the ranks of a torchrun share the model."""

import argparse
from typing import TYPE_CHECKING

from ultramem_megatron.memory.tables.partitions import shared_partitions

if TYPE_CHECKING:  # imported where it is used: --help and a wrong flag need no torch
    from ultramem_megatron.inference.layout import InferenceLayout


def add_layout_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say how the ranks of a torchrun share the model."""
    parser.add_argument(
        "--tensor-model-parallel-size", "--tensor-parallel-size", type=int,
        dest="tensor_parallel_size", metavar="T",
        help="Ranks that share each weight. Default: all. (The short name goes with the next "
        "release.)",
    )  # fmt: skip
    parser.add_argument(
        "--ultramem-parallel-size", type=int, metavar="P",
        help="Ranks that share each value table. Default: all (with experts, those of one tensor-"
        "parallel group).",
    )  # fmt: skip
    parser.add_argument(
        "--ultramem-partition", choices=("auto", *shared_partitions()), default="auto",
        help="How they share it, as in training. Default: auto, by bytes moved.",
    )  # fmt: skip


def layout_from(options: argparse.Namespace) -> "InferenceLayout":
    """The layout those flags ask for."""
    from ultramem_megatron.inference.layout import InferenceLayout

    return InferenceLayout(
        options.tensor_parallel_size, options.ultramem_parallel_size, options.ultramem_partition
    )
