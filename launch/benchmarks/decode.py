"""Latency of a decode step, dense against MoE against UltraMem (the paper's figures 1b, 1c, 6c, 7).

    ultramem bench decode --out DIR [--scale 151m|1.6b|small] [--quick] \\
        [--cuda-graphs] [Megatron's flags, for all models: --group-query-attention ...]
    ultramem bench decode plot DIR/decode.csv

Models have random weights and are measured one after another: batches of 1 to 1024 sequences, each
with one token to decode after a filled KV cache; then with fewer sparse parameters at one batch.
All have the same attention (decode_attention.py); an MoE is measured twice, with Megatron's loop
over its experts and with one grouped product of them. Writes DIR/decode.csv, one row per model and
batch, and its figures.
"""

import argparse
import contextlib
import ctypes
import gc
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from launch.benchmarks.decode_models import BARS, SCALES, DecodeModel, Scale
from ultramem_megatron.errors import CommandParser, UltraMemError, exit_on_user_error
from ultramem_megatron.faults.results_folder import results_folder
from ultramem_megatron.tools import rows
from ultramem_megatron.tools.plan.sizes import ReadSizes

Row = dict[str, str | int | float]

QUICK = (1, 32, 64)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, or draw figures of a CSV."""
    words = sys.argv[1:] if argv is None else list(argv)
    from launch.benchmarks.decode_figures import draw

    if words[:1] == ["plot"]:
        parser = CommandParser(prog="ultramem bench decode plot")
        parser.add_argument("csv", type=Path, help="What the benchmark wrote.")
        return draw(parser.parse_args(words[1:]).csv)
    options = _parse(words)
    results_folder(options.out)
    file = options.out / "decode.csv"
    _keep_freed_memory()
    rows.write_as_made(file, _rows(_scale(options), options))
    draw(file)
    print(f"{file} and figures beside it")
    return None


def _parse(words: Sequence[str]) -> argparse.Namespace:
    default = "1.6b" if torch.cuda.is_available() else "151m"
    parser = CommandParser(
        prog="ultramem bench decode",
        epilog="Megatron's flags may follow; they hold for all models.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, help="Folder for CSV and figures.")
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default=default,
        help="Sizes of the models; here %(default)s: the paper's 1.6b on a GPU, else 151m.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="Batches 1, 32 and 64 only, no smaller models."
    )
    parser.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="On a GPU: replay each step as a CUDA graph, but for Megatron's loop over experts, "
        "which waits for the host.",
    )
    options, flags = parser.parse_known_args(words)
    options.flags = flags
    if options.cuda_graphs and not torch.cuda.is_available():
        raise UltraMemError("--cuda-graphs: there is no NVIDIA GPU here. Measure without them.")
    return options


def _scale(options: argparse.Namespace) -> Scale:
    scale = SCALES[options.scale]
    if not options.quick:
        return scale
    batches = tuple(batch for batch in scale.batches if batch in QUICK)
    return replace(scale, fewer=(), batches=batches)


def _keep_freed_memory() -> None:
    """Let glibc reuse large buffers, where PyTorch takes them from it, on a CPU.

    Else each step gives them back and takes them again page by page, or not, depending on what the
    models before left in the heap: the order of models would decide.
    """
    if torch.cuda.is_available() or not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    for parameter, value in ((_M_TRIM_THRESHOLD, -1), (_M_MMAP_MAX, 0)):
        libc.mallopt(parameter, value)


def _rows(scale: Scale, options: argparse.Namespace) -> Iterator[Row]:
    for model in scale.trio:
        yield from _measure(model, scale, scale.batches, options)
    for model in scale.fewer:
        yield from _measure(model, scale, (scale.fixed_batch,), options)


@torch.inference_mode()
def _measure(
    model: DecodeModel, scale: Scale, batches: Sequence[int], options: argparse.Namespace
) -> Iterator[Row]:
    from launch.benchmarks.weight_access import read_sizes
    from ultramem_megatron.inference.loading import prepare_for_inference
    from ultramem_megatron.inference.untrained import untrained_model

    with contextlib.redirect_stdout(io.StringIO()):  # Megatron lists all its arguments
        built, args = untrained_model([*model.flags, *scale.extra_flags, *options.flags])
    prepare_for_inference(built)
    sizes = read_sizes(built, args.moe_router_topk, _picks(args))
    bench = _Bench(model.name, built, args, sizes, scale, options)
    yield from bench.rows(model.kind, batches, graphed=options.cuda_graphs and model.kind != "moe")
    if model.kind == "moe":
        from megatron.core.utils import unwrap_model

        from launch.benchmarks.grouped_experts import group_experts

        group_experts(unwrap_model(built))
        yield from bench.rows("moe-grouped", batches, graphed=options.cuda_graphs)
    del built, bench
    gc.collect()


class _Bench(NamedTuple):
    """A built model under measurement."""

    name: str
    model: Any
    args: argparse.Namespace
    sizes: ReadSizes
    scale: Scale
    options: argparse.Namespace

    def rows(self, kind: str, batches: Sequence[int], *, graphed: bool) -> Iterator[Row]:
        """One of each batch that fits."""
        for batch in batches:
            try:
                row = self._row(kind, batch, graphed)
            except torch.OutOfMemoryError:
                print(f"{self.name}: a batch of {batch} does not fit, left out", file=sys.stderr)
                return
            print(
                f"{kind:12} {self.name:46} batch {batch:5}  {row['median_ms']:9.2f} ms"
                f"  {int(row['bytes_counted']) / 1e9:7.3f} GB read",
                file=sys.stderr,
            )
            yield row

    def _row(self, kind: str, batch: int, graphed: bool) -> Row:
        from launch.benchmarks import decode_attention
        from launch.benchmarks.decode_step import DecodeStep
        from launch.benchmarks.environment import environment_columns
        from launch.benchmarks.weight_access import count_weight_bytes, other_weight_bytes
        from ultramem_megatron.tools.plan.sizes import weight_bytes_read

        step = DecodeStep(self.model, [self.scale.cache_length] * batch, self.args.vocab_size)
        if graphed:
            step.capture()
        timing = step.measure(self.scale.seconds)
        with count_weight_bytes(self.model) as counted:
            step()
        read, dtype = sum(counted.values()), self.args.params_dtype
        return {
            "scale": self.options.scale,
            "kind": kind,
            "model": self.name,
            "bar": BARS[kind],
            "attention": decode_attention.NAME,
            "batch": batch,
            "cache_length": self.scale.cache_length,
            "dtype": str(dtype).split(".")[-1],
            "cuda_graph": int(graphed),
            "parameters": _parameters(self.model),
            "median_ms": round(timing.median, 3),
            "p20_ms": round(timing.p20, 3),
            "p80_ms": round(timing.p80, 3),
            "repeats": timing.repeats,
            **{f"{kind}_bytes_counted": n for kind, n in counted.items()},
            "bytes_counted": read,
            "bytes_modelled": weight_bytes_read(self.sizes, batch, dtype.itemsize),
            "bytes_all": read + other_weight_bytes(self.model) + step.cache_bytes,
            "flags": " ".join(self.options.flags),
            **environment_columns(),
        }


def _picks(args: argparse.Namespace) -> int:
    from ultramem_megatron.megatron.flags.arguments import config_from_args

    ultramem = config_from_args(args)
    return ultramem.picks if ultramem else 0


def _parameters(model: Any) -> int:
    """Without embedding and output layer, as the paper counts."""
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if "embedding" not in name and "output_layer" not in name
    )


if __name__ == "__main__":
    with exit_on_user_error():
        main()
