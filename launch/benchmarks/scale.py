"""What a rank of a large world costs before its first step, without that world.

    ultramem bench scale --out DIR [--quick]

Groups of a fake process group, the model on the meta device, the shards of its checkpoint: one
process is rank 0 of up to 16,384. What grows with the world, or with the tables, shows. Writes
DIR/scale.csv.
"""

import argparse
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from launch.benchmarks.environment import environment_columns
from ultramem_megatron.errors import CommandParser, exit_on_user_error
from ultramem_megatron.tools.rows import write_as_made

_PRESET = "ultramem-1.6b-x12"
_LARGE = ("--ultramem-num-keys", "16384")  # 2.7e8 values in each memory
_LARGEST = ("--ultramem-num-keys", "46080")  # 2.1e9: as many as a memory may have


@dataclass(frozen=True)
class Case:
    """A world, and how its tables are cut."""

    world_size: int
    table_ranks: int
    partition: str
    flags: tuple[str, ...] = ()


CASES = (
    Case(64, 64, "dimension"),
    Case(64, 64, "number"),
    Case(512, 512, "number"),
    Case(4096, 512, "number"),
    Case(4096, 4096, "number"),
    Case(16384, 512, "number"),
    Case(64, 64, "number", _LARGE),
    Case(4096, 1024, "dimension", _LARGE),
    Case(16384, 4096, "number", _LARGE),
    Case(16384, 16384, "number", _LARGEST),
)
_QUICK = (Case(64, 64, "number"), Case(512, 64, "number"))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = CommandParser(
        prog="ultramem bench scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for scale.csv")
    parser.add_argument("--quick", action="store_true", help="64 and 512 ranks only")
    options = parser.parse_args(argv)
    write_as_made(options.out / "scale.csv", _rows(_QUICK if options.quick else CASES))
    print(options.out / "scale.csv")


def _rows(cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    environment = environment_columns()
    for case in cases:
        row = measured(case)
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        yield {**row, **environment}


def measured(case: Case) -> dict[str, Any]:
    """One row: seconds, numbers of parameters on rank 0, of process groups, of shards."""
    from ultramem_megatron.tools.plan.build import built_stage, command_line, parse

    words = [
        *("--ultramem-parallel-size", str(case.table_ranks)),
        *("--ultramem-partition", case.partition),
        *("--global-batch-size", str(case.world_size)),
        *case.flags,
    ]
    begun = time.process_time()
    run = parse(command_line(_PRESET, words), case.world_size)
    parsed = time.process_time()
    new_group = torch.distributed.new_group
    with (
        mock.patch("torch.distributed.new_group", side_effect=new_group) as made,
        built_stage(run) as chunks,
    ):
        built = time.process_time()
        shards = _shards(chunks[0])
        planned = time.process_time()
        parameters = list(chunks[0].parameters())
    tables = [p for p in parameters if hasattr(p, "ultramem_values")]
    assert run.ultramem is not None
    return {
        "world_size": case.world_size,
        "table_ranks": case.table_ranks,
        "partition": case.partition,
        "values": run.ultramem.num_values * len(run.ultramem.spans),
        "value_dim": run.ultramem.value_dim,
        "rank_parameters": sum(p.numel() for p in parameters),
        "rank_table_parameters": sum(p.numel() for p in tables),
        "process_groups": made.call_count,
        "shards": shards,
        "parse_s": round(parsed - begun, 3),
        "groups_and_model_s": round(built - parsed, 3),
        "shards_s": round(planned - built, 3),
        "peak_process_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 3),
    }


def _shards(chunk: Any) -> int:
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    found = nested_values(chunk.sharded_state_dict(metadata={"dp_cp_group": group}))
    return sum(isinstance(value, ShardedTensor) for value in found)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
