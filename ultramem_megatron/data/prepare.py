"""Prepares text for training: tokenizer, Megatron datasets and a manifest, in one folder.

    ultramem data prepare [--text PATH] --output DIR --vocab-size N

DIR then holds `tokenizer/`, `train.{bin,idx}`, `valid.{bin,idx}` and `data.json`. A second call
with the same text and vocabulary finds them and returns at once. The folder is built beside DIR
and moved there when it is complete, so that a preparation that was killed is never half used.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ultramem_megatron.data import indexed, text, tokenizer
from ultramem_megatron.errors import UltraMemError

FORMAT = 1  # part of the key; raise it when the same text would be prepared differently
MANIFEST = "data.json"
SEED = 1234  # shuffles the documents, so that neither part of the split is a single topic
VALIDATION_SHARE = 0.05  # of the documents


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


def prepare(path: Path | None, output: Path, vocab_size: int) -> Prepared:
    """Fills `output` from the text under `path` (None: the standard library's sources).

    Raises:
        UltraMemError: the text or the vocabulary size is unusable, or `output` is someone else's
            folder; the message says what to do.
    """
    _refuse_foreign(output)
    with _progress("collecting text"):
        corpus = text.collect(path)
    key = _key(corpus, vocab_size)
    output.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(output):
        found = load(output)
        if found is not None and found.key == key:
            _say(f"{output} is up to date: {describe(found)}")
            return found
        partial = output.with_name(f".{output.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        prepared = _build(corpus, partial, vocab_size, key)
        _replace(output, partial)
    _say(f"wrote {output}: {describe(prepared)}")
    return prepared


def load(folder: Path) -> Prepared | None:
    """Reads a prepared folder's manifest; None when the folder is absent or not whole."""
    try:
        prepared = Prepared(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
        whole = all((folder / n).stat().st_size == size for n, size in prepared.sizes.items())
    except (OSError, ValueError, TypeError):
        return None
    return prepared if whole else None


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


def _build(corpus: text.Corpus, folder: Path, vocab_size: int, key: str) -> Prepared:
    folder.mkdir()
    documents = text.split_into_documents(corpus, SEED)
    num_valid = max(1, round(VALIDATION_SHARE * len(documents)))
    parts = {"train": documents[:-num_valid], "valid": documents[-num_valid:]}
    with _progress(f"training a tokenizer of up to {vocab_size} entries"):
        trained = tokenizer.train(parts["train"], vocab_size)
        tokenizer.save(trained, folder / "tokenizer")
    entries = trained.get_vocab_size()
    counts = {}
    for name, part in parts.items():
        with _progress(f"writing {len(part)} documents to {name}.bin"):
            tokens = tokenizer.encode(trained, part)
            counts[name] = indexed.write(folder / name, _report(tokens, len(part)), entries)
    prepared = Prepared(
        key=key,
        source=corpus.source,
        files=corpus.files,
        skipped=corpus.skipped,
        documents=len(documents),
        text_bytes=corpus.num_bytes,
        vocab_size=entries,
        train_tokens=int(counts["train"].sum()),
        valid_tokens=int(counts["valid"].sum()),
        unigram_entropy=unigram_entropy(counts["train"] + counts["valid"]),
        unigram_cross_entropy_valid=unigram_cross_entropy(counts["train"], counts["valid"]),
        sizes=_sizes(folder),
    )
    manifest = json.dumps(asdict(prepared), indent=2) + "\n"
    (folder / MANIFEST).write_text(manifest, encoding="utf-8")
    return prepared


def _key(corpus: text.Corpus, vocab_size: int) -> str:
    recipe = [FORMAT, SEED, VALIDATION_SHARE, vocab_size]
    digest = hashlib.sha256(json.dumps(recipe).encode())
    for document in corpus.texts:
        raw = document.encode()
        digest.update(len(raw).to_bytes(8, "little"))  # "ab" + "c" is not "a" + "bc"
        digest.update(raw)
    return digest.hexdigest()


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def _refuse_foreign(output: Path) -> None:
    """Only a folder that a preparation made is ever replaced."""
    if output.is_file() or (
        output.is_dir() and any(output.iterdir()) and not (output / MANIFEST).exists()
    ):
        raise UltraMemError(
            f"--output {output}: exists and was not made by this command (no {MANIFEST}). "
            "Give a new or an empty folder."
        )


def _replace(output: Path, partial: Path) -> None:
    # Killed between the two renames, `output` is absent and is made again: slow, never wrong.
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    partial.rename(output)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _only_one(output: Path) -> Iterator[None]:
    """Lets a second preparation of the same folder wait for the first."""
    with output.with_name(f".{output.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for another preparation of {output}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _progress(what: str) -> Iterator[None]:
    started = time.monotonic()
    _say(f"{what} ...")
    yield
    _say(f"{what}: done in {time.monotonic() - started:.1f} s")


def _report(documents: Iterable[list[int]], total: int) -> Iterator[list[int]]:
    """Passes documents on and says every few seconds how far it is."""
    last = time.monotonic()
    for done, tokens in enumerate(documents, start=1):
        yield tokens
        if time.monotonic() - last > 5:
            last = time.monotonic()
            _say(f"  {done} of {total} documents")


def _say(line: str) -> None:
    print(f"[data] {line}", flush=True)


def build_parser() -> argparse.ArgumentParser:
    """The command line of `ultramem data prepare`."""
    parser = argparse.ArgumentParser(
        prog="ultramem data prepare",
        description="Turn text into a tokenizer and Megatron datasets.",
    )
    parser.add_argument(
        "--text",
        type=Path,
        help="a UTF-8 file, or a folder read recursively (default: the Python standard library)",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to fill")
    parser.add_argument(
        "--vocab-size", type=int, default=8192, help="tokenizer entries (default: %(default)s)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    args = build_parser().parse_args(argv)
    try:
        prepare(args.text, args.output, args.vocab_size)
    except (UltraMemError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
