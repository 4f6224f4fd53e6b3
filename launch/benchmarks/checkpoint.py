"""What saving and loading a table costs, in the foreground and in the background.

    ultramem bench checkpoint --out DIR [--quick]

A table of growing size with Adam's two moments, float32, on one rank, through Megatron's
distributed checkpoints as training writes them. Waited for: how long training stands still; a save
in the background (--async-save) goes on beside it. What is loaded must be what was saved. Writes
DIR/checkpoint.csv, medians.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launch.benchmarks.environment import environment_columns
from ultramem_megatron.errors import CommandParser, exit_on_user_error
from ultramem_megatron.faults.results_folder import results_folder
from ultramem_megatron.megatron.flags.process import open_process
from ultramem_megatron.tools.rows import write_as_made

_WIDTH = 64  # columns
_ROWS = tuple(4**power * 2**12 for power in range(5))  # 4k to 1M values: 3 to 805 MB
_PARTS = ("weight", "exp_avg", "exp_avg_sq")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = CommandParser(
        prog="ultramem bench checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for checkpoint.csv and what is saved")
    add("--quick", action="store_true", help="the two smallest tables, once")
    options = parser.parse_args(argv)
    sizes, rounds = (_ROWS[:2], 1) if options.quick else (_ROWS, 3)
    results_folder(options.out)
    open_process()  # a CPU in the place of CUDA, where there is none
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        write_as_made(options.out / "checkpoint.csv", _rows(sizes, rounds, Path(folder)))
        dist.destroy_process_group()
    print(options.out / "checkpoint.csv")


def _rows(sizes: Sequence[int], rounds: int, folder: Path) -> Iterator[dict[str, Any]]:
    environment = environment_columns()
    for rows in sizes:
        taken = [_round(rows, folder / f"{rows}-{number}") for number in range(rounds + 1)][1:]
        row = {
            "values": rows,
            "width": _WIDTH,
            "bytes": len(_PARTS) * rows * _WIDTH * 4,
            "bytes_on_disk": int(taken[0]["bytes_on_disk"]),
            **{
                name: round(statistics.median(each[name] for each in taken), 4)
                for name in taken[0]
                if name.endswith("_s")
            },
            "rounds": rounds,
        }
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        yield {**row, **environment}


def _round(rows: int, folder: Path) -> dict[str, float]:
    """Seconds of one save, one in the background, and one load."""
    table = {name: torch.randn(rows, _WIDTH) for name in _PARTS}
    saved, behind = folder / "saved", folder / "behind"
    for each in (saved, behind):
        each.mkdir(parents=True)
    save_s = _save(table, saved)
    waited_for_s, in_all_s = _save_behind(table, behind)
    for each in (behind, saved):
        found, load_s = _load(rows, each)
        assert all(torch.equal(found[name], table[name]) for name in _PARTS), "not what was saved"
    written = sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())
    shutil.rmtree(folder)
    return {
        "bytes_on_disk": written,
        "save_s": save_s,
        "async_waited_for_s": waited_for_s,
        "async_in_all_s": in_all_s,
        "load_s": load_s,
    }


def _sharded(table: dict[str, Tensor]) -> dict[str, Any]:
    from megatron.core.dist_checkpointing import ShardedTensor

    return {name: ShardedTensor.from_rank_offsets(name, part) for name, part in table.items()}


def _save(table: dict[str, Tensor], folder: Path) -> float:
    from megatron.core import dist_checkpointing

    begun = time.perf_counter()
    dist_checkpointing.save(_sharded(table), str(folder))
    return time.perf_counter() - begun


def _save_behind(table: dict[str, Tensor], folder: Path) -> tuple[float, float]:
    """Seconds until training would go on, and until all is written."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    queue = AsyncCallsQueue()
    begun = time.perf_counter()
    request = dist_checkpointing.save(
        _sharded(table), str(folder), async_sharded_save=True, async_strategy="mcore"
    )
    queue.schedule_async_request(request)
    waited = time.perf_counter() - begun
    queue.maybe_finalize_async_calls(blocking=True)
    in_all = time.perf_counter() - begun
    queue.close()
    return waited, in_all


def _load(rows: int, folder: Path) -> tuple[dict[str, Tensor], float]:
    from megatron.core import dist_checkpointing

    into = {name: torch.zeros(rows, _WIDTH) for name in _PARTS}
    begun = time.perf_counter()
    found: dict[str, Tensor] = dist_checkpointing.load(_sharded(into), str(folder))
    return found, time.perf_counter() - begun


if __name__ == "__main__":
    with exit_on_user_error():
        main()
