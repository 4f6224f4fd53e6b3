"""Decoding with value tables on disk and a cache of their rows, beside tables in memory.

    ultramem bench tables --load DIR --data PREFIX --out DIR [--shares 0.01 0.1] [--rounds 3]

Continues windows of a text, all at once, by sampling. Cold: none of the checkpoint's files is in
the system's memory, no slot of a cache is filled. Warm: the files are, and other windows were
continued before. Writes DIR/tables.csv, medians; hits and reads are of rows, each once a step.
"""

import argparse
import gc
import os
import statistics
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch.benchmarks.environment import environment_columns
from ultramem_megatron.errors import CommandParser, UltraMemError, exit_on_user_error
from ultramem_megatron.faults.results_folder import results_folder
from ultramem_megatron.tools.rows import write_as_made

_IO = Path("/proc/self/io")
_SAMPLED = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 1, "batching": "static"}


class Case(NamedTuple):
    """share: slots over rows of a table, 0 for no cache."""

    table_memory: str
    share: float
    warm: bool


class Found(NamedTuple):
    """slots: of a table. read: bytes that came from the disk. tokens: that were added."""

    slots: int
    reads: int
    hits: int
    read: int
    tokens: int
    seconds: float


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write. Raises UltraMemError."""
    options = _parse(argv)
    results_folder(options.out)
    write_as_made(options.out / "tables.csv", _rows(options, _rows_of_a_table(options)))
    print(options.out / "tables.csv")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="ultramem bench tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--load", required=True, help="checkpoint folder of a model with memories")
    add("--data", required=True, help="indexed text (prefix), of which windows are continued")
    add("--out", type=Path, required=True, help="folder for tables.csv")
    add("--shares", type=float, nargs="+", default=[0.01, 0.03, 0.1, 0.3], help="slots over rows")
    add("--texts", type=int, default=4, help="at once (default %(default)s)")
    add("--prompt", type=int, default=32, help="tokens of each (default %(default)s)")
    add("--tokens", type=int, default=64, help="added to each (default %(default)s)")
    add("--rounds", type=int, default=3, help="of every case (default %(default)s)")
    options = parser.parse_args(argv)
    for name in ("texts", "prompt", "tokens", "rounds"):
        if getattr(options, name) < 1:
            raise UltraMemError(f"--{name} is {getattr(options, name)}; it must be at least 1.")
    for share in options.shares:
        if not 0 < share <= 1:
            raise UltraMemError(f"--shares has {share}; each must be more than 0 and at most 1.")
    if not _IO.exists():
        raise UltraMemError("ultramem bench tables reads /proc/self/io, which is Linux's.")
    return options


def _rows_of_a_table(options: argparse.Namespace) -> int:
    """All tables of a model have as many."""
    from ultramem_megatron.megatron.checkpoint.folder import checkpoint_folder, stored_args
    from ultramem_megatron.megatron.checkpoint.stored_flags import completed
    from ultramem_megatron.megatron.flags.arguments import config_from_args

    args = completed(stored_args(checkpoint_folder(options.load, None)))
    ultramem = config_from_args(args)
    if ultramem is None:
        raise UltraMemError(f"--load {options.load}: this model has no memories, and no tables.")
    if options.prompt + options.tokens > args.max_position_embeddings:
        raise UltraMemError(
            f"--prompt {options.prompt} and --tokens {options.tokens} exceed the model's "
            f"{args.max_position_embeddings} positions."
        )
    return ultramem.num_values


def _rows(options: argparse.Namespace, values: int) -> Iterator[dict[str, Any]]:
    cases = [
        Case("device", 0, True),
        *(Case("disk", share, warm) for share in (0, *options.shares) for warm in (False, True)),
    ]
    for case in cases:
        found = [
            _decode(case, options, round(case.share * values), number)
            for number in range(options.rounds)
        ]
        reads, hits = sum(each.reads for each in found), sum(each.hits for each in found)
        rate = statistics.median(each.tokens / each.seconds for each in found)
        row = {
            "table_memory": case.table_memory,
            "start": "warm" if case.warm else "cold",
            "share": case.share,
            "slots": found[0].slots,
            "reads": reads // len(found),
            "hit_rate": round(hits / reads, 4) if reads else "",
            "disk_mb": round(statistics.median(each.read for each in found) / 1e6, 2),
            "tokens_per_second": round(rate, 1),
            "texts": options.texts,
            "prompt": options.prompt,
            "tokens": options.tokens,
            "rounds": options.rounds,
        }
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        yield {**row, **environment_columns()}


def _decode(case: Case, options: argparse.Namespace, slots: int, number: int) -> Found:
    """One round; each has other texts. slots: of a table."""
    from megatron.core.utils import unwrap_model

    from ultramem_megatron.inference.layout import InferenceLayout
    from ultramem_megatron.inference.loading import load_for_inference
    from ultramem_megatron.inference.sampling import continue_tokens
    from ultramem_megatron.memory.tables.stored import CachedTable
    from ultramem_megatron.memory.tables.value_table import value_tables

    gc.collect()  # files that the last model has mapped are not forgotten
    layout = InferenceLayout(1, 1, table_memory=case.table_memory, table_cache_rows=slots)
    loaded = load_for_inference(options.load, layout=layout)
    asked = Namespace(tokens=options.tokens, cuda_graphs=False, **_SAMPLED)
    texts = _texts(options, number, loaded.args.padded_vocab_size)
    if case.warm:
        continue_tokens(loaded, texts[options.texts :], asked)
    else:
        _out_of_memory(Path(options.load))
    tables = value_tables(unwrap_model(loaded.model)).values()
    caches = [table.stored.hot for table in tables if isinstance(table.stored, CachedTable)]
    for hot in caches:
        hot.reads = hot.hits = 0
    before, begun = _bytes_read(), time.perf_counter()
    added = continue_tokens(loaded, texts[: options.texts], asked)
    seconds = time.perf_counter() - begun
    return Found(
        slots,
        sum(hot.reads for hot in caches),
        sum(hot.hits for hot in caches),
        _bytes_read() - before,
        sum(map(len, added)),
        seconds,
    )


def _texts(options: argparse.Namespace, number: int, vocabulary: int) -> list[list[int]]:
    """Windows of the text for this round: those that are timed, and as many for warming up."""
    from ultramem_megatron.tools.evaluate.perplexity import read_stream

    stream = read_stream(options.data, vocabulary)
    windows = 2 * options.texts
    begin = number * windows * options.prompt
    found = stream[begin : begin + windows * options.prompt].tolist()
    if len(found) < windows * options.prompt:
        raise UltraMemError(
            f"--data {options.data} has {len(stream):,} tokens, too few for {options.rounds} rounds"
            f" of {windows} texts of {options.prompt}. Give a longer one, or less of them."
        )
    return [found[at : at + options.prompt] for at in range(0, len(found), options.prompt)]


def _out_of_memory(folder: Path) -> None:
    """Have the system forget what it holds of these files."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _bytes_read() -> int:
    """By this process, from disks."""
    words = _IO.read_text().split()
    return int(words[words.index("read_bytes:") + 1])


if __name__ == "__main__":
    with exit_on_user_error():
        main()
