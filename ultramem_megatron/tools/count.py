"""How often each row of the value tables is read in ordinary text: what fine-tuning spares.

    ultramem count --load DIR --data PREFIX [PREFIX ...] --out FILE

FILE is for `ultramem train --ultramem-train-rows T --ultramem-background-reads FILE`: for each
table the reads of each row, and by how many batches it was read. A batch is --batch-size windows
of text. Under torchrun the ranks share the model, and the work; FILE is the same.
"""

import argparse
import contextlib
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ultramem_megatron.errors import CommandParser, UltraMemError, exit_on_user_error
from ultramem_megatron.inference.layout_flags import add_layout_arguments, layout_from

_EVERY = 5.0  # seconds between two lines of progress


def main(argv: Sequence[str] | None = None) -> None:
    """Load, run, write. Raises UltraMemError for what the user can put right."""
    options = _parse(argv)
    with contextlib.redirect_stdout(sys.stderr):
        found = _counted(options)
    if os.environ["RANK"] == "0":
        found.write(options.out)
        for number, table in found.tables.items():
            read = int((table.reads > 0).sum())
            print(f"table of layer {number}: {read} of {len(table.reads)} rows were read")
        print(f"wrote {options.out}: {found.batches} batches")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="ultramem count",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--load", required=True, help="Checkpoint folder (training's --save).")
    add("--ckpt-step", type=int, help="Iteration to load; default: the latest.")
    add("--data", nargs="+", required=True, metavar="PREFIX", help="Indexed data sets.")
    add("--out", type=Path, required=True, metavar="FILE", help="What to write, an npz.")
    add("--batch-size", type=int, default=8, help="Windows of a batch. Default 8.")
    add("--max-batches", type=int, help="Of all data; default: all there are.")
    add_layout_arguments(parser)
    options = parser.parse_args(argv)
    for name in ("batch_size", "max_batches"):
        value = getattr(options, name)
        if value is not None and value < 1:
            flag = "--" + name.replace("_", "-")
            raise UltraMemError(f"{flag} is {value}; it must be a whole number >= 1.")
    _check_place(options.out)
    return options


def _check_place(out: Path) -> None:
    """Raise UltraMemError now for what would be found when all is counted."""
    folder = out.absolute().parent
    if not folder.is_dir():
        raise UltraMemError(f"--out {out}: its folder is not there. Make it first.")
    if out.is_dir() or not os.access(folder, os.W_OK):
        what = "is a folder" if out.is_dir() else "its folder cannot be written to"
        raise UltraMemError(f"--out {out}: {what}. Give a file in one that can be written to.")


def _counted(options: argparse.Namespace) -> Any:
    """The BackgroundReads of all ranks."""
    from ultramem_megatron.inference.loading import load_model
    from ultramem_megatron.memory.layer import memory_layers
    from ultramem_megatron.tools.evaluate.perplexity import read_stream
    from ultramem_megatron.tools.evaluate.windows import batches, count_windows

    model, args = load_model(options.load, ckpt_step=options.ckpt_step, layout=layout_from(options))
    if not any(memory_layers(model)):
        raise UltraMemError("the checkpoint's model has no memory layers: nothing to count.")
    streams = [read_stream(prefix, args.padded_vocab_size) for prefix in options.data]
    number = sum(
        -(-count_windows(len(stream), args.seq_length) // options.batch_size) for stream in streams
    )
    number = min(number, options.max_batches or number)
    cut = (batches(stream, args.seq_length, options.batch_size) for stream in streams)
    return count(model, itertools.islice(itertools.chain(*cut), number), number)


def count(model: Any, every: Iterator[Any], number: int) -> Any:
    """The BackgroundReads of a model in evaluation mode; all ranks call it.

    every: `number` batches of `evaluate.windows`. Replicas take them in turn, whole, so that the
    batches that read a row are the same on every layout.
    """
    import torch
    from megatron.core import parallel_state

    from ultramem_megatron.inference.lockstep import serve_until_all_finish
    from ultramem_megatron.tools.evaluate.perplexity import causal_mask

    replicas = parallel_state.get_data_parallel_group()
    device = next(model.parameters()).device
    counts = _Counts(model)
    said = started = time.monotonic()
    with torch.no_grad():
        for done, batch in enumerate(every):
            if done % replicas.size() != replicas.rank():
                continue
            tokens = batch.tokens.to(device)
            positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
            counts.counted = batch.counts.to(device)
            model(tokens, positions, causal_mask(tokens.shape[1], device))
            counts.end_batch()
            if time.monotonic() - said > _EVERY:
                said = time.monotonic()
                left = (said - started) / (done + 1) * (number - done - 1)
                print(f"{done + 1} of {number} batches, about {left:.0f} s left", flush=True)
    counts.end()
    serve_until_all_finish(model)
    return counts.of_all(replicas, number)


class _Counts:
    """Of this rank: by table, reads of each row, batches that read it, reads of this batch."""

    def __init__(self, model: Any) -> None:
        import torch

        from ultramem_megatron.memory.layer import memory_layers

        self.tables: dict[int, Any] = {}
        self.layers: dict[int, list[Any]] = {}
        self.counted: Any = None
        """(B, S) bool: positions that are no filling."""
        self._hooks = []
        for layer in memory_layers(model):
            size = layer.config.num_values
            zeros = torch.zeros(3, size, dtype=torch.int64, device=layer.values.weight.device)
            self.tables.setdefault(layer.table_number, zeros)
            self.layers.setdefault(layer.table_number, []).append(layer)
            self._hooks.append(layer.retrieval.register_forward_hook(self._hook(layer)))

    def _hook(self, layer: Any) -> Any:
        from ultramem_megatron.kernels.read_statistics import add_reads
        from ultramem_megatron.memory.retrieval.addresses import split_address

        def add(_module: Any, _inputs: Any, retrieved: Any) -> None:
            rows, _ = split_address(layer.locate(retrieved.addresses), layer.config.num_values)
            # Megatron's layers have the sequence first.
            add_reads(self.tables[layer.table_number][2], rows[self.counted.T.flatten()])

        return add

    def end_batch(self) -> None:
        for table in self.tables.values():
            table[0] += table[2]
            table[1] += table[2] > 0
            table[2] = 0

    def end(self) -> None:
        """Count no more."""
        for hook in self._hooks:
            hook.remove()

    def of_all(self, replicas: Any, batches: int) -> Any:
        """Added up over the replicas; a collective."""
        import torch.distributed as dist

        from ultramem_megatron.megatron.background_reads import (
            BackgroundReads,
            TableReads,
            sum_of_keys,
        )

        for _, table in sorted(self.tables.items()):
            dist.all_reduce(table, group=replicas)
        tables = {
            n: TableReads(table[0], table[1], sum_of_keys(self.layers[n]))
            for n, table in sorted(self.tables.items())
        }
        return BackgroundReads(batches, tables)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
