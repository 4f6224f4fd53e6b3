"""How much of a memory's communication is exposed, with and without --ultramem-overlap.

    ultramem bench overlap --ranks 2 --delay-ms 0 10 20 --out DIR --plot

Steps (forward and backward) of a transformer block with one memory on several ranks of this
machine, over links that take so many milliseconds longer. Writes DIR/overlap.csv, a Chrome trace of
one step each, and with --plot DIR/overlap.png. On GPUs, one for each rank, links are as they are.
"""

import argparse
import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from launch.benchmarks import memory_block, trace
from launch.benchmarks.environment import environment_columns
from launch.benchmarks.memory_block import BlockShape
from launch.benchmarks.slow_link import slow_link
from launch.benchmarks.timeline import plot
from ultramem_megatron.errors import CommandParser, UltraMemError, exit_on_user_error
from ultramem_megatron.memory.spans import parse_spans
from ultramem_megatron.tools.rows import write

_TRACED_STEPS = 5
_QUIET = {"OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99", "PYTHONWARNINGS": "ignore"}


class Result(NamedTuple):
    """One row: medians over steps of the slowest rank (step) and of rank 0 (exposed)."""

    partition: str
    delay_ms: float
    overlap: str
    step_ms: float
    exposed_ms: float
    exchanges: int


def measure(
    shape: BlockShape, device: torch.device, delays_ms: Sequence[float], steps: int
) -> tuple[list[Result], dict[str, Any]]:
    """On one rank of several: all rows of one partition, and a median trace of each kind."""
    blocks = {name: memory_block.build(shape, overlap=name == "on") for name in ("off", "on")}
    x, grad = memory_block.inputs(shape, device)

    def run(name: str) -> Any:
        return memory_block.step(blocks[name], x, grad)

    _check_equal(run("off"), run("on"))
    rows, shown = [], {}
    for delay in delays_ms:
        with slow_link(delay / 1000) if delay else nullcontext():
            seconds = _step_seconds(run, steps)
            traces = _traces(run, blocks, _TRACED_STEPS)
        for name, found in traces.items():
            shown[name] = sorted(found, key=trace.exposed)[len(found) // 2]
            exposed_ms = trace.exposed(shown[name]) / 1000
            exchanges = len(trace.transfers(shown[name]))
            step_ms = 1000 * statistics.median(seconds[name])
            rows.append(Result(shape.partition, delay, name, step_ms, exposed_ms, exchanges))
    return rows, shown


def _check_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """What is not the same is not worth timing."""
    for name, tensor in first.items():
        if not torch.equal(tensor, second[name]) and tensor.device.type == "cpu":
            raise AssertionError(f"overlap changes {name}")


def _step_seconds(run: Callable[[str], Any], steps: int) -> dict[str, list[float]]:
    """Wall time of each step on the slowest rank; both kinds in turn, so that noise hits both."""
    seconds: dict[str, list[float]] = {"off": [], "on": []}
    for _ in range(steps):
        for name, taken in seconds.items():
            _line_up()
            start = time.perf_counter()
            run(name)
            _synchronize()
            slowest = torch.tensor(time.perf_counter() - start, device=_device())
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            taken.append(float(slowest))
    return seconds


def _traces(
    run: Callable[[str], Any], blocks: dict[str, nn.Module], steps: int
) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {name: [] for name in blocks}
    for _ in range(steps):
        for name, block in blocks.items():
            _line_up()
            with trace.marked_layers(block):
                found[name].append(trace.traced(functools.partial(run, name)))
    return found


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _line_up() -> None:
    _synchronize()
    dist.barrier()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _run_rank(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    device = memory_block.initialize()
    rows: list[Result] = []
    for partition in options.partition:
        shape = _shape(options, partition)
        found, traces = measure(shape, device, options.delay_ms, options.steps)
        rows += found
        if dist.get_rank() == 0:
            for name, shown in traces.items():
                shown.export_chrome_trace(str(options.out / f"{partition}_{name}.trace.json"))
            if options.plot and partition == options.partition[0]:
                plot(traces, options.out / "overlap.png", _title(options, shape))
    if dist.get_rank() == 0:
        _write(rows, options)
    dist.destroy_process_group()


def _shape(options: argparse.Namespace, partition: str) -> BlockShape:
    [span] = parse_spans(options.span, options.layers)
    return BlockShape(
        layers=options.layers,
        span=span,
        hidden_size=options.hidden_size,
        sequence=options.tokens,
        num_keys=options.num_keys,
        partition=partition,
    )


def _title(options: argparse.Namespace, shape: BlockShape) -> str:
    return (
        f"Rank 0 of {options.ranks}, span {shape.span}, {shape.partition}-wise, "
        f"{shape.sequence} tokens per rank, {options.delay_ms[-1]:g} ms per exchange"
    )


def _write(rows: list[Result], options: argparse.Namespace) -> None:
    constant = {
        "ranks": options.ranks,
        "layers": options.layers,
        "span": options.span,
        "tokens_per_rank": options.tokens,
        "hidden_size": options.hidden_size,
        "num_values": options.num_keys**2,
        "steps": options.steps,
        **environment_columns(),
    }
    write(options.out / "overlap.csv", [_shown(row) | constant for row in rows])
    print(f"{'partition':>10} {'delay ms':>9} {'overlap':>8} {'step ms':>9} {'exposed ms':>11}")
    for row in rows:
        print(
            f"{row.partition:>10} {row.delay_ms:9g} {row.overlap:>8} {row.step_ms:9.1f} "
            f"{row.exposed_ms:11.1f}"
        )


def _shown(row: Result) -> dict[str, Any]:
    return {k: f"{v:.2f}" if isinstance(v, float) else v for k, v in row._asdict().items()}


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(prog="ultramem bench overlap", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--ranks", type=int, default=2, help="processes, and parts of the table (default 2)")
    add(
        "--delay-ms",
        type=float,
        nargs="+",
        default=[0.0, 5.0, 10.0, 20.0],
        metavar="MS",
        help="milliseconds added to every exchange; measured one after the other",
    )
    add("--partition", nargs="+", choices=("dimension", "number"), default=["dimension", "number"])
    add("--steps", type=int, default=10, help="timed steps of each kind (default 10)")
    add("--layers", type=int, default=6, help="(default 6)")
    add("--span", default="2:5", help="where the memory reads and joins (default 2:5)")
    add("--tokens", type=int, default=512, help="per rank (default 512)")
    add("--hidden-size", type=int, default=256, help="(default 256)")
    add("--num-keys", type=int, default=128, help="values: its square (default 128)")
    add("--out", type=Path, required=True, help="folder to write to")
    add("--plot", action="store_true", help="draw the steps with the last delay")
    options = parser.parse_args(argv)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    if options.ranks < 2:
        raise UltraMemError(f"--ranks {options.ranks}: one rank exchanges nothing. Use 2 or more.")
    if options.steps < 1:
        raise UltraMemError(f"--steps {options.steps}: it must be at least 1.")
    if min(options.delay_ms) < 0:
        raise UltraMemError(f"--delay-ms {min(options.delay_ms):g}: it must be 0 or more.")
    if len(parse_spans(options.span, options.layers)) != 1:
        raise UltraMemError(f"--span {options.span}: the block has one memory. Give one span.")
    gpus = torch.cuda.device_count()
    if 0 < gpus < options.ranks:
        raise UltraMemError(
            f"--ranks {options.ranks}: this machine has {gpus} GPUs. Use at most {gpus} ranks, or "
            f"hide the GPUs (CUDA_VISIBLE_DEVICES=)."
        )
    if gpus and any(options.delay_ms):
        raise UltraMemError("--delay-ms: links between GPUs cannot be delayed. Use --delay-ms 0.")


def main(argv: Sequence[str] | None = None) -> int:
    """Start the ranks; in a rank, measure."""
    words = sys.argv[1:] if argv is None else list(argv)
    options = _parse(words)
    options.out.mkdir(parents=True, exist_ok=True)
    if "RANK" in os.environ:
        _run_rank(options)
        return 0
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(options.ranks),
        "-m",
        "launch.benchmarks.overlap",
        *words,
    ]
    return subprocess.run(command, env=_QUIET | dict(os.environ)).returncode


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
