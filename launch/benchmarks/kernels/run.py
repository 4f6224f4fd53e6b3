"""Check every candidate against the reference, then time it; one CSV row a candidate and pass."""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from launch.benchmarks.environment import environment_columns
from launch.benchmarks.kernels import (
    convolutions,
    fbgemm,
    layers,
    lookups,
    measure,
    prevalued_lookups,
    topks,
)
from launch.benchmarks.kernels.candidate import Candidate, check
from launch.benchmarks.kernels.ratios import print_ratios
from launch.benchmarks.kernels.shapes import SWEEPS, Shape, sweeps
from launch.benchmarks.kernels.timings import BOTH, timings
from ultramem_megatron.tools.rows import write_as_made

Row = dict[str, str | int | float]
_LOOKUP_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
# Two keys of nearly equal score may change places between two orders of summation.
_SELECTION_TOLERANCE = 3e-2
_PREVALUED = "lookup behind pre-values"
_WITH_TABLE = ("lookup", _PREVALUED, "layer")
_USABLE_SHARE = 0.8
"""Of the free memory; the rest is left to activations and to what the allocator cannot join."""

_OPS: dict[str, Callable[[Shape, torch.device], list[Candidate]]] = {
    "lookup": lookups.candidates,
    _PREVALUED: prevalued_lookups.candidates,
    "side top-m": topks.side_candidates,
    "grid top-m": topks.tucker_candidates,
    "query convolution": convolutions.candidates,
    "layer": layers.candidates,
}


def run(file: Path, device: torch.device, quick: bool, names: Sequence[str] = SWEEPS) -> None:
    """Time everything; on a CPU with one thread. Prints as it goes, writes `file` row by row."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        bandwidth = measure.copy_bandwidth(device)
        print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s")
        print_ratios(write_as_made(file, _rows(device, quick, names, bandwidth)))
    finally:
        torch.set_num_threads(threads)


def _rows(
    device: torch.device, quick: bool, names: Sequence[str], bandwidth: float
) -> Iterator[Row]:
    environment = {
        **environment_columns(),
        "triton": _installed("triton"),
        "device": device.type,
        "copy_bandwidth": round(bandwidth),
    }
    seen: dict[tuple[str, Shape], list[Row]] = {}
    for sweep, shape in sweeps(quick, device, names):
        for op in _OPS:
            if (op, shape) not in seen:
                seen[op, shape] = list(_measured(op, shape, device, bandwidth))
            for row in seen[op, shape]:
                there = environment | {"torch": row.get("torch", environment["torch"])}
                yield {"sweep": sweep, "op": op, **shape.columns(), **row, **there}


def _measured(op: str, shape: Shape, device: torch.device, bandwidth: float) -> Iterator[Row]:
    print(f"\n{op}: {', '.join(f'{k} {v}' for k, v in shape.columns().items())}")
    needed = _needed_bytes(op, shape)
    if needed > _USABLE_SHARE * measure.free_memory(device):
        print(f"  left out: needs about {needed / 1e9:.0f} GB of memory")
        return
    torch.manual_seed(1)
    candidates = _OPS[op](shape, device)
    reads = op in ("lookup", _PREVALUED)
    tolerance = _LOOKUP_TOLERANCE[shape.dtype] if reads else _SELECTION_TOLERANCE
    errors = check(candidates, tolerance)
    if op == "layer":
        candidates += layers.others(shape, device)
    for candidate in candidates:
        for row in timings(candidate, device):
            row["error"] = errors.get(candidate.name, "")
            yield _with_rates(op, shape, row, bandwidth)
    del candidates
    gc.collect()
    if op == "lookup":
        for row in fbgemm.rows(shape, device, tolerance):
            yield _with_rates(op, shape, row, bandwidth)


def _with_rates(op: str, shape: Shape, row: Row, bandwidth: float) -> Row:
    """Prints it, too."""
    row |= _rates(op, shape, row["passes"] == BOTH, float(row["ms_min"]), bandwidth)
    _print(row)
    return row


def _needed_bytes(op: str, shape: Shape) -> int:
    """What the tables of all candidates take, and their gradients, of which one lives at a time."""
    if op not in _WITH_TABLE:
        return 0
    # Ours and the baseline read one table. Beside the layer stand other packages' tables.
    widths = [shape.value_dim] * (2 if op == _PREVALUED else 1)
    widths += layers.widths_of_others(shape) if op == "layer" else []
    in_its_dtype = (sum(widths) + max(widths)) * shape.dtype.itemsize
    if op == "layer":  # the gradient of a table without main_grad, which keeps its memory
        in_its_dtype += shape.value_dim * shape.dtype.itemsize
    # main_grad, and a dense gradient of a slower candidate before it is rounded.
    in_float32 = 2 * shape.value_dim * torch.float32.itemsize * (2 if op == _PREVALUED else 1)
    return shape.values * (in_its_dtype + in_float32)


def _rates(op: str, shape: Shape, backward: bool, ms: float, bandwidth: float) -> Row:
    """Counted bytes and FLOPs of the least that the op must do, and the share of bandwidth."""
    if op == "lookup":
        moved, flops = shape.lookup_bytes(backward), shape.lookup_flops(backward)
        share = round(moved / (1e-3 * ms) / bandwidth, 4)
        return {"bytes": moved, "flops": flops, "bandwidth_share": share}
    flops = shape.layer_macs() * 2 * shape.tokens * (3 if backward else 1) if op == "layer" else 0
    return {"bytes": "", "flops": flops or "", "bandwidth_share": ""}


def _print(row: Row) -> None:
    share = row["bandwidth_share"]
    reached = f"  {100 * float(share):5.1f}% of copy" if share != "" else ""
    peak = row["backward_extra_bytes"]
    memory = f"  backward +{float(peak) / 1e6:.0f} MB" if peak != "" else ""
    print(
        f"  {row['candidate']:42} {row['passes']:17} {float(row['ms_min']):9.2f} ms "
        f"(median {float(row['ms_median']):.2f}){reached}{memory}"
    )


def _installed(package: str) -> str:
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return "none"
