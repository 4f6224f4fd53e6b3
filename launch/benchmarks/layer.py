"""A memory layer's forward and backward beside plain PyTorch's, and beside what they must take.

    ultramem bench layer --out DIR [--quick]

The layer with Megatron's `main_grad`, without it, and the plain baseline are checked against the
reference and make each step in turns, on one thread of a CPU. The limit of a step is the time of
its matrix products at the rate of a large one (FLOPs of forward and of both gradients), and of the
lookup's counted bytes at the rate at which rows as wide, as many and as random are read; both rates
are measured just before. Selections and norms are not in it. Writes DIR/layer.csv, a row a
candidate, and prints the ratios that are held to. Time is the process's own.
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from launch.benchmarks.environment import environment_columns
from launch.benchmarks.kernels import layers, measure
from launch.benchmarks.kernels.candidate import check, implementations
from launch.benchmarks.kernels.shapes import DEFAULT, Shape
from ultramem_megatron.errors import CommandParser, exit_on_user_error
from ultramem_megatron.faults.results_folder import results_folder
from ultramem_megatron.tools.rows import write_as_made

Row = dict[str, Any]
_CPU = torch.device("cpu")
_STEPS = 9  # of each, in turns
_KEYS = (128, 1024)  # 16k and 1M values
_PASSES = 3  # forward, and a product for each of two gradients
_TOLERANCE = 3e-2  # two keys of nearly equal score may change places
_PLAIN_TOLERANCE = {torch.float32: 3e-2, torch.bfloat16: 0.3}  # it compares scores as rounded
_INNER = 2048  # columns of the product that is taken for a fast one


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write. Raises UltraMemError for a candidate that computes something else."""
    parser = CommandParser(
        prog="ultramem bench layer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for layer.csv")
    parser.add_argument("--quick", action="store_true", help="one tiny layer of each dtype")
    options = parser.parse_args(argv)
    results_folder(options.out)
    tiny = replace(DEFAULT, tokens=16, hidden=32, num_keys=32, topk=4, value_dim=16)
    shapes = [
        replace(tiny if options.quick else DEFAULT, dtype=dtype, **({} if options.quick else keys))
        for dtype in (torch.float32, torch.bfloat16)
        for keys in ([{}] if options.quick else [{"num_keys": n} for n in _KEYS])
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        write_as_made(options.out / "layer.csv", _rows(shapes))
    finally:
        torch.set_num_threads(threads)


def _rows(shapes: Sequence[Shape]) -> Iterator[Row]:
    environment = environment_columns()
    for shape in shapes:
        limits = limit(shape)
        found = _timed(shape)
        for row in found:
            row |= limits
            row["times_limit"] = round(row["ms_min"] / row["limit_ms"], 2)
            yield {**shape.columns(), **row, **environment}
        _print(shape, found)


def _timed(shape: Shape) -> list[Row]:
    torch.manual_seed(1)
    candidates = layers.candidates(shape, _CPU)
    plain = [candidates[0], *(c for c in candidates if c.name == "plain")]
    errors = check([c for c in candidates if c.name != "plain"], _TOLERANCE)
    errors |= check(plain, _PLAIN_TOLERANCE[shape.dtype])
    ours = implementations(_CPU)[-1]
    kept = [c for c in candidates if c.name in (ours, "plain", layers.WITHOUT_MAIN_GRAD)]
    taken: dict[str, list[float]] = {c.name: [] for c in kept}
    for _ in range(_STEPS):
        for candidate in kept:
            candidate.training()  # what the one before it left in caches would count as its own
            taken[candidate.name].append(measure.once(candidate.training, _CPU))
    return [
        {
            "candidate": "ours" if name == ours else name,
            "ms_min": round(min(times), 3),
            "ms_median": round(statistics.median(times), 3),
            "steps": len(times),
            "error": errors[name],
        }
        for name, times in taken.items()
    ]


def limit(shape: Shape) -> dict[str, float]:
    """Milliseconds that a step's parts take at measured rates, their sum, and the rates."""
    product_rate, row_rate = _product_rate(shape), _row_rate(shape)
    parts = {
        name: 1e3 * _PASSES * 2 * macs * shape.tokens / product_rate
        for name, macs in shape.product_macs().items()
    }
    parts["lookup"] = 1e3 * shape.lookup_bytes(backward=True) / row_rate
    return {
        **{f"limit_{name}_ms": round(ms, 4) for name, ms in parts.items()},
        "limit_ms": round(sum(parts.values()), 4),
        "product_flops_per_second": round(product_rate),
        "row_bytes_per_second": round(row_rate),
    }


def _product_rate(shape: Shape) -> float:
    """FLOPs per second of a product of this dtype, tokens and width."""
    left = torch.randn(shape.tokens, shape.hidden).to(shape.dtype)
    right = torch.randn(_INNER, shape.hidden).to(shape.dtype).T
    flops = 2 * shape.tokens * shape.hidden * _INNER
    return flops / (1e-3 * measure.timed(lambda: left @ right, _CPU).minimum)


def _row_rate(shape: Shape) -> float:
    """Bytes per second of rows as wide as the table's, picked at random, summed in float32."""
    table = torch.ones(shape.values, shape.value_dim * shape.dtype.itemsize // 4)
    picks = torch.randint(shape.values, (shape.tokens, shape.picks))
    read = picks.numel() * table[0].nbytes
    taken = measure.timed(lambda: F.embedding_bag(picks, table, mode="sum"), _CPU)
    return read / (1e-3 * taken.minimum)


def _print(shape: Shape, rows: Sequence[Row]) -> None:
    ms = {row["candidate"]: row["ms_min"] for row in rows}
    parts = ", ".join(
        f"{name.split('_')[1]} {value:.1f}"
        for name, value in rows[0].items()
        if name.startswith("limit_") and name != "limit_ms"
    )
    print(f"{str(shape.dtype).removeprefix('torch.')}, {shape.values} values, ms: {ms}")
    print(f"  over its limit {ms['ours'] / rows[0]['limit_ms']:.2f} ({parts})")
    print(f"  speed over plain PyTorch's {ms['plain'] / ms['ours']:.2f}")
    print(f"  without main_grad over with it {ms[layers.WITHOUT_MAIN_GRAD] / ms['ours']:.2f}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
