"""Steps of real runs on a CPU beside what plan --fit predicts for their layouts.

    ultramem bench fit --out DIR [--quick]

A small GPT with memories on 1, 2 and 4 ranks of this machine, one thread each, a process group over
gloo. The model is given this machine's rates: a core's matrix products and copies are measured
first, ranks beyond the cores share them. Writes DIR/fit.csv, a row for each layout: predicted
milliseconds of a step; cpu_ms, what all ranks computed in it over the cores they had, which other
programs on the machine hardly change, but which knows no waiting; and the wall time.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from launch.benchmarks.environment import environment_columns
from ultramem_megatron.errors import CommandParser, UltraMemError, exit_on_user_error
from ultramem_megatron.tools.rows import write_as_made

_MODEL = shlex.split(
    "--num-layers 4 --hidden-size 256 --num-attention-heads 8 --seq-length 256 "
    "--max-position-embeddings 256 --position-embedding-type rope --disable-bias-linear "
    "--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 "
    "--global-batch-size 8 --tokenizer-type NullTokenizer --vocab-size 4096 "
    "--ultramem-spans 1:2/3:4 --ultramem-num-keys 128 --ultramem-topk 16"
)
_TRAINING = shlex.split("--mock-data --lr 1e-4 --eval-iters 0 --eval-interval 1000 --num-workers 0")
_LINK = 1e9  # bytes/s that gloo moves between two processes here, assumed
# tensor, stages, data, tables, partition, micro-batch
LAYOUTS = (
    (1, (4,), 1, 1, "replicated", 2),
    (1, (4,), 2, 2, "dimension", 2),
    (1, (4,), 2, 2, "number", 2),
    (1, (4,), 2, 1, "replicated", 2),
    (2, (4,), 1, 2, "dimension", 2),
    (1, (2, 2), 1, 1, "replicated", 2),
    (1, (4,), 4, 4, "dimension", 2),
    (2, (4,), 2, 4, "dimension", 2),
    (4, (4,), 1, 4, "dimension", 2),
    (1, (2, 2), 2, 2, "number", 2),
)
_WARM_UP = 2


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = CommandParser(
        prog="ultramem bench fit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for fit.csv")
    parser.add_argument("--quick", action="store_true", help="one layout, few steps")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    layouts, steps = (LAYOUTS[:1], 3) if options.quick else (LAYOUTS, 12)
    write_as_made(options.out / "fit.csv", _rows(layouts, steps))
    print(options.out / "fit.csv")


def _rows(layouts: Sequence[tuple[Any, ...]], steps: int) -> Iterator[dict[str, Any]]:
    environment = environment_columns()
    gigaflops, copied = _rate_of_products(), _rate_of_copies()
    for sizes in layouts:
        row = _row(sizes, steps, gigaflops, copied)
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        yield {**row, **environment}


def _row(sizes: tuple[Any, ...], steps: int, gigaflops: float, copied: float) -> dict[str, Any]:
    """Of one layout: predicted and measured milliseconds of a step."""
    from ultramem_megatron.tools.plan.build import command_line, parse
    from ultramem_megatron.tools.plan.fit import counts_of, layout_words, work_of
    from ultramem_megatron.tools.plan.fit_model import Layout, Machine
    from ultramem_megatron.tools.plan.fit_stage import predict

    tensor, stages, data, tables, partition, micro_batch = sizes
    layout = Layout(tensor, stages, 1, data, tables, partition, micro_batch=micro_batch)
    ranks = layout.stage_ranks * len(stages)
    share = min(1.0, len(os.sched_getaffinity(0)) / ranks)
    words = command_line(None, _MODEL)
    run = parse(words)
    machine = Machine(
        ranks, 1e12, ranks, _LINK * share, _LINK * share, gigaflops * 1e9 * share, copied * share
    )
    [counts] = [c for c in counts_of(words, ranks, ranks) if c.tensor_ranks == tensor]
    predicted = predict(counts, work_of(run), machine, layout)
    measured = _measured([*words, *layout_words(run, layout, ranks)], ranks, steps)
    seconds = measured[0]["step"][_WARM_UP:]
    computed = sum(statistics.median(rank["cpu"][_WARM_UP:]) for rank in measured)
    return {
        "ranks": ranks,
        "tensor": tensor,
        "pipeline": len(stages),
        "data": data,
        "table_ranks": tables,
        "partition": partition,
        "predicted_ms": round(1e3 * (predicted.seconds + predicted.hidden), 1),
        "bound": predicted.bound,
        "cpu_ms": round(1e3 * computed / ranks / share, 1),
        "fastest_ms": round(1e3 * min(seconds), 1),
        "median_ms": round(1e3 * statistics.median(seconds), 1),
        "steps": len(seconds),
        "core_gflops": round(gigaflops, 1),
        "core_copy_gb_per_s": round(copied / 1e9, 1),
    }


def _measured(words: Sequence[str], ranks: int, steps: int) -> list[dict[str, Any]]:
    """What each rank of a run on this machine wrote of its steps."""
    with tempfile.TemporaryDirectory(prefix="fit_") as folder:
        flags = [*words, *_TRAINING, "--train-iters", str(steps + _WARM_UP)]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks), "-m", "launch.benchmarks.training_steps"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, f"{folder}/steps", *flags], env=environment, capture_output=True, text=True
        )
        files = sorted(Path(folder).glob("steps*"))
        if done.returncode or len(files) != ranks:
            raise UltraMemError(f"A run on {ranks} ranks failed: {done.stderr[-2000:]}")
        return [json.loads(file.read_text()) for file in files]


def _rate_of_products() -> float:
    """GFLOP/s of one core, float32."""
    x, y = torch.randn(512, 256), torch.randn(256, 1024)
    return 2 * 512 * 256 * 1024 / _fastest(lambda: x @ y) / 1e9


def _rate_of_copies() -> float:
    """Bytes/s read and written by one core."""
    x = torch.randn(2**24)
    y = torch.empty_like(x)
    return 2 * x.nbytes / _fastest(lambda: y.copy_(x))


def _fastest(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of some calls."""
    taken = []
    for _ in range(20):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return min(taken)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
