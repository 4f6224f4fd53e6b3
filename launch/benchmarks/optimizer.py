"""AdamW on the rows that a step reads beside PyTorch's fused AdamW on all rows.

    ultramem bench optimizer --out DIR [--quick]

A table of 64 columns and its moments in float32. Each step reads rows drawn evenly, so many that a
share of all is touched; both optimizers make it, in turns. The steps before rows are as far behind
as they will be are not counted. Counted for rows are the read, the step and what it sweeps; real
reads are skewed, and rows that every step reads have nothing to catch up. Each number of the table
and both moments must come out the same to the bit. Writes DIR/optimizer.csv, medians; time is the
process's own on the CPU, so that other programs count little.
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from launch.benchmarks.environment import environment_columns
from ultramem_megatron.errors import CommandParser, UltraMemError, exit_on_user_error
from ultramem_megatron.faults.results_folder import results_folder
from ultramem_megatron.kernels.adam_rows import AdamRows, AdamStep, Moments
from ultramem_megatron.kernels.adam_rows.torch_path import dense_step
from ultramem_megatron.tools.rows import write_as_made

_WIDTH = 64  # columns
_COUNTED = 15  # steps
_WARM = 3  # times 1 / share: few rows are further behind than that
_BEFORE = 1000  # steps of the training before; biases are corrected as in its middle
_CASES = [(2**power, share) for power in (14, 18, 20) for share in (0.01, 0.1, 1.0)]
_FEW = (2**18, 0.001)  # the longest warm-up
_QUICK = [(2**10, 0.1), (2**10, 1.0)]


class Times(NamedTuple):
    """CPU seconds of one step of each; of rows, also of the read alone."""

    dense: float
    rows: float
    read: float


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write. Raises UltraMemError if the two disagree in a bit."""
    parser = CommandParser(
        prog="ultramem bench optimizer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for optimizer.csv")
    parser.add_argument("--quick", action="store_true", help="a table of 1,024 rows alone")
    options = parser.parse_args(argv)
    results_folder(options.out)
    cases = _QUICK if options.quick else [*_CASES, _FEW]
    write_as_made(options.out / "optimizer.csv", _rows(cases))
    print(options.out / "optimizer.csv")


def _rows(cases: Sequence[tuple[int, float]]) -> Iterator[dict[str, Any]]:
    environment = environment_columns()
    for values, share in cases:
        times = _run(values, share)
        dense, rows, read = (statistics.median(part) for part in zip(*times, strict=True))
        ratios = sorted(each.dense / each.rows for each in times)
        row = {
            "values": values,
            "width": _WIDTH,
            "share_touched": share,
            "dense_ms": round(1e3 * dense, 3),
            "rows_ms": round(1e3 * rows, 3),
            "read_ms": round(1e3 * read, 3),
            "dense_over_rows": round(statistics.median(ratios), 2),
            "lowest": round(ratios[0], 2),
            "highest": round(ratios[-1], 2),
            "steps": len(times),
        }
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        yield {**row, **environment}


def _run(values: int, share: float) -> list[Times]:
    """Of the steps that count."""
    generator = torch.Generator().manual_seed(1)
    table = 0.02 * torch.randn(values, _WIDTH, generator=generator)
    ours, dense = (Moments(table.clone(), *torch.zeros(2, *table.shape)) for _ in range(2))
    rows, grad = AdamRows(values, table.device), torch.zeros_like(table)
    times = []
    for number in range(1, math.ceil(_WARM / share) + _COUNTED + 1):
        step = AdamStep(1e-3, 0.1, 0.9, 0.95, 1e-8, _BEFORE + number)
        picks = _picks(values, share, generator)
        start = time.process_time()
        rows.read(ours, picks)
        read = time.process_time() - start
        grad[picks] = torch.randn(len(picks), _WIDTH, generator=generator)
        start = time.process_time()
        rows.step(ours, grad, step)
        moved = time.process_time() - start
        start = time.process_time()
        dense_step(step, dense.values, grad, dense.mean, dense.square)
        times.append(Times(time.process_time() - start, read + moved, read))
        grad[picks] = 0.0
    rows.catch_up(ours)
    if not all(map(torch.equal, ours[:3], dense[:3])):
        raise UltraMemError(
            f"AdamW on rows and on all rows differ after {number} steps of {values} values, of "
            f"which {share:g} are touched. PyTorch's kernel for CPUs rounds numbers that fill no "
            f"vector otherwise: run with OMP_NUM_THREADS=1, or report it."
        )
    return times[-_COUNTED:]


def _picks(values: int, share: float, generator: torch.Generator) -> Tensor:
    """Rows (u,), some twice, of which `share` of all are touched."""
    if share == 1.0:
        return torch.randperm(values, generator=generator)
    return torch.randint(values, (round(-math.log1p(-share) * values),), generator=generator)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
