"""Prepares text for training: tokenizer, Megatron datasets and a manifest, in one folder.

    ultramem data prepare [--text PATH] [--json-key KEY] --output DIR --vocab-size N

DIR then holds `tokenizer/`, `train.{bin,idx}`, `valid.{bin,idx}` and `data.json`. A second call
with the same text and vocabulary finds them and returns at once. New files are made in a folder
inside DIR and moved in place when all are complete, so that a preparation that was killed is never
half used. Of DIR only what `data.json` lists is ever replaced.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ultramem_megatron.data import indexed, tokenizer
from ultramem_megatron.data.collect import check_source, collect
from ultramem_megatron.data.encode import encode
from ultramem_megatron.data.own_folder import OwnFolder, shown
from ultramem_megatron.data.progress import metered, say, stage
from ultramem_megatron.data.spool import Documents, Spool, cut
from ultramem_megatron.errors import CommandParser, UltraMemError

FORMAT = 2  # part of the key; raise it when the same text would be prepared differently
MANIFEST = "data.json"
SEED = 1234  # shuffles the documents, so that neither part of the split is a single topic
VALIDATION_SHARE = 0.05  # of the documents
TOKENIZER_BYTES = 1 << 30  # of the shuffled training text, which the vocabulary is learnt from


@dataclass(frozen=True)
class Prepared:
    """What `data.json` says about a prepared folder.

    Attributes:
        key: hash of the text and of everything that decides how it is prepared.
        source: where the text came from.
        files: number of text files used; `skipped` were passed over as not being text.
        documents: number of documents the files were cut into.
        text_bytes: size of the text, bytes of UTF-8.
        vocab_size: entries of the tokenizer; fewer than asked for when the text has too few.
        train_tokens, valid_tokens: tokens with the end-of-document tokens.
        unigram_entropy: entropy of the token frequencies over all tokens, nats per token. A model
            that knows how often each token occurs, and nothing else, has this loss on the data.
        unigram_cross_entropy_valid: loss on the validation tokens of the token frequencies
            counted in the training tokens, one added to each count, nats per token.
        sizes: size in bytes of each file of the folder.
        unreadable: number of folders that could not be read.
        links: number of links that were not followed.
    """

    key: str
    source: str
    files: int
    skipped: int
    documents: int
    text_bytes: int
    vocab_size: int
    train_tokens: int
    valid_tokens: int
    unigram_entropy: float
    unigram_cross_entropy_valid: float
    sizes: dict[str, int]
    unreadable: int = 0
    links: int = 0


KEYS = tuple(field.name for field in fields(Prepared) if field.default is MISSING)
"""By these a manifest is known to be of our making."""


def prepare(
    path: Path | None,
    output: Path,
    vocab_size: int,
    json_key: str | None = None,
    workers: int | None = None,
) -> Prepared:
    """Fills `output` from the text under `path` (None: the standard library's sources).

    Args:
        path: a file or a folder.
        output: folder to fill.
        vocab_size: entries of the tokenizer.
        json_key: what names the text in JSON lines, Parquet and saved datasets; None: plain text.
        workers: processes that encode; None: one for each core.

    Raises:
        UltraMemError: the text or the vocabulary size is unusable, or `output` is someone else's
            folder; the message says what to do.
    """
    tokenizer.check_vocab_size(vocab_size)
    if workers is not None and workers < 1:
        raise UltraMemError(f"--workers {workers}: must be at least 1.")
    _refuse_odd_name(output)
    check_source(path, json_key, output)
    folder = OwnFolder(output, MANIFEST, KEYS)
    with folder.locked(lambda: say(f"waiting for another preparation of {output}")):
        found = load(output)
        if found is not None and found.key == _key_of(path, json_key, output, vocab_size):
            say(f"{output} is up to date: {describe(found)}")
            return found
        with folder.building() as built:
            content = _build(path, json_key, output, built, vocab_size, workers or _cores())
            prepared = replace(content, sizes=folder.publish(built, asdict(content)))
    say(f"wrote {output}: {describe(prepared)}")
    return prepared


def load(folder: Path) -> Prepared | None:
    """Reads a prepared folder's manifest; None when the folder is absent or not whole."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        known = {field.name for field in fields(Prepared)}
        prepared = Prepared(**{name: content[name] for name in content if name in known})
        whole = all((folder / n).stat().st_size == size for n, size in prepared.sizes.items())
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return prepared if whole and isinstance(prepared.key, str) else None


def describe(prepared: Prepared) -> str:
    """One line of the numbers a reader wants first."""
    return (
        f"{prepared.source}, {prepared.text_bytes / 1e6:.1f} MB in {prepared.documents} documents, "
        f"{prepared.train_tokens:,} + {prepared.valid_tokens:,} tokens (training + validation), "
        f"vocabulary {prepared.vocab_size}, unigram entropy {prepared.unigram_entropy:.2f} nats"
    )


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy of the distribution of `counts`, nats."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def unigram_cross_entropy(train: np.ndarray, valid: np.ndarray) -> float:
    """Loss on tokens counted in `valid` of the frequencies in `train` plus one each, nats."""
    log_shares = np.log((train + 1) / (train.sum() + train.size))
    return float(-(valid * log_shares).sum() / valid.sum())


def _key_of(path: Path | None, json_key: str | None, output: Path, vocab_size: int) -> str:
    """The key that a preparation would get now."""
    with stage("comparing the text with what is prepared"):
        spool = Spool(None)
        collect(path, json_key, output, spool)
    return _key(spool, vocab_size)


def _key(spool: Spool, vocab_size: int) -> str:
    recipe = [FORMAT, SEED, VALIDATION_SHARE, vocab_size]
    return hashlib.sha256(json.dumps(recipe).encode() + spool.digest()).hexdigest()


def _build(
    path: Path | None,
    json_key: str | None,
    output: Path,
    built: Path,
    vocab_size: int,
    workers: int,
) -> Prepared:
    """Fills `built`; the sizes are left out."""
    spooled = built / "text"
    with spooled.open("wb") as file, stage("collecting text"):
        spool = Spool(file)
        found = collect(path, json_key, output, spool)
    reader = os.open(spooled, os.O_RDONLY)
    try:
        documents = cut(reader, spool, SEED)
        trained, counts = _write_parts(documents, spooled, built, vocab_size, workers)
    finally:
        os.close(reader)
        spooled.unlink()
    return Prepared(
        key=_key(spool, vocab_size),
        source=found.source,
        files=found.files,
        skipped=len(found.skipped),
        documents=len(documents.order),
        text_bytes=spool.num_bytes,
        vocab_size=trained.get_vocab_size(),
        train_tokens=int(counts["train"].sum()),
        valid_tokens=int(counts["valid"].sum()),
        unigram_entropy=unigram_entropy(counts["train"] + counts["valid"]),
        unigram_cross_entropy_valid=unigram_cross_entropy(counts["train"], counts["valid"]),
        sizes={},
        unreadable=len(found.unreadable),
        links=len(found.links),
    )


def _write_parts(
    documents: Documents, spooled: Path, built: Path, vocab_size: int, workers: int
) -> tuple[Tokenizer, dict[str, np.ndarray]]:
    """Trains the tokenizer and writes both datasets; returns how often they hold each token."""
    num_valid = max(1, round(VALIDATION_SHARE * len(documents.order)))
    train, valid = documents.split(len(documents.order) - num_valid)
    with stage(f"training a tokenizer of up to {vocab_size} entries"):
        total = min(train.num_bytes, TOKENIZER_BYTES)
        trained = tokenizer.train(metered(_first(train, total), total), vocab_size)
        tokenizer.save(trained, built / "tokenizer")
    counts = {}
    for name, part in {"train": train, "valid": valid}.items():
        with stage(f"writing {len(part.order)} documents to {name}.bin"):
            batches = metered(encode(trained, spooled, part, workers), part.num_bytes)
            tokens = (document for batch in batches for document in batch)
            counts[name] = indexed.write(built / name, tokens, trained.get_vocab_size())
    return trained, counts


def _first(documents: Documents, total: int) -> Iterator[tuple[int, str]]:
    """Bytes and text of the first documents, of `total` bytes together or one document more."""
    for size, text in documents.texts():
        if total <= 0:
            return
        total -= size
        yield size, text


def _refuse_odd_name(output: Path) -> None:
    """Tokenizers are written by a library that takes UTF-8 names only."""
    if shown(output.absolute()) != str(output.absolute()):
        raise UltraMemError(
            f"--output {shown(output)}: the name is not UTF-8, and a tokenizer cannot be saved "
            "under it. Give another one."
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _path(word: str) -> Path:
    if not word:  # of an unset variable; Path takes it for the current folder
        raise argparse.ArgumentTypeError("is empty; '.' is the current folder")
    return Path(word)


def build_parser() -> argparse.ArgumentParser:
    """The command line of `ultramem data prepare`."""
    parser = CommandParser(
        prog="ultramem data prepare",
        description="Turn text into a tokenizer and Megatron datasets.",
    )
    add = parser.add_argument
    add(
        "--text",
        type=_path,
        help="a file, or a folder read recursively: UTF-8 text, or with --json-key JSON lines, "
        "Parquet, a saved Hugging Face dataset (default: the Python standard library)",
    )
    add("--json-key", metavar="KEY", help="what names the text in records: JSON's key, or column")
    add("--output", type=_path, required=True, help="folder to fill")
    add("--vocab-size", type=int, default=8192, help="tokenizer entries (default: %(default)s)")
    add("--workers", type=int, help="processes that encode (default: one for each core)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    try:
        args = build_parser().parse_args(argv)
        prepare(args.text, args.output, args.vocab_size, args.json_key, args.workers)
    except (UltraMemError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
