"""Collects the text to train on: one's own files, or the Python standard library's.

The standard library is the default because it is on every machine that can run this project, it
is real text (code, comments and docstrings, some 10 MB), and reading it needs no network.
"""

import os
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ultramem_megatron.errors import UltraMemError

# Files with these endings are text by intent: one that is not UTF-8 is an error. Any other file
# is used when it happens to be UTF-8 text and passed over when it is not (pictures, archives).
TEXT_SUFFIXES = frozenset({".csv", ".html", ".json", ".jsonl", ".md", ".py", ".rst", ".txt"})

# Not the library's own prose: other people's packages, test data whose presence depends on how
# Python was packaged, and character tables.
STDLIB_SKIPPED = frozenset(
    {"__pycache__", "dist-packages", "encodings", "idle_test", "site-packages", "test", "tests"}
)

MIN_CHARACTERS = 10_000  # less than this leaves no validation text worth the name
MAX_PIECE = 32_768  # characters; longer files become several documents, so that both sides of
MIN_PIECE = 1_024  # the train/validation split hold parts of a corpus of few, long files
MIN_PIECES = 200  # aimed at, by shortening the pieces down to MIN_PIECE


@dataclass(frozen=True)
class Corpus:
    """Text in the order of its sorted file names.

    Attributes:
        source: where it came from, for people to read.
        files: number of files used.
        skipped: number of files passed over because they are not text.
        texts: one entry per file.
    """

    source: str
    files: int
    skipped: int
    texts: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the text as UTF-8, bytes."""
        return sum(len(text.encode()) for text in self.texts)


def collect(path: Path | None) -> Corpus:
    """Reads the text under `path`, or the standard library's sources when it is None.

    Raises:
        UltraMemError: the path is missing, holds no text or too little, or is not UTF-8.
    """
    corpus = _standard_library() if path is None else _from_path(path)
    characters = sum(len(text) for text in corpus.texts)
    if characters < MIN_CHARACTERS:
        raise UltraMemError(
            f"--text {path or '(default)'}: {characters} characters in {corpus.files} file(s), but "
            f"at least {MIN_CHARACTERS} are needed to train and validate on. Add more text."
        )
    return corpus


def split_into_documents(corpus: Corpus, seed: int) -> list[str]:
    """Cuts long texts into documents and shuffles them, the same way for the same seed."""
    characters = sum(len(text) for text in corpus.texts)
    limit = max(MIN_PIECE, min(MAX_PIECE, characters // MIN_PIECES))
    documents = [piece for text in corpus.texts for piece in split_text(text, limit)]
    random.Random(seed).shuffle(documents)
    return documents


def split_text(text: str, limit: int) -> Iterator[str]:
    """Yields the consecutive pieces of `text`, of at most `limit` characters, blank ones left out.

    A piece ends after a blank line where one lies in its second half, else after a line, else
    anywhere, so that a document rarely starts in the middle of a sentence.
    """
    start = 0
    while len(text) - start > limit:
        stop = start + limit
        for boundary in ("\n\n", "\n"):
            found = text.rfind(boundary, start + limit // 2, stop)
            if found >= 0:
                stop = found + len(boundary)
                break
        if text[start:stop].strip():
            yield text[start:stop]
        start = stop
    if text[start:].strip():
        yield text[start:]


def _standard_library() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for file in _walk(root, STDLIB_SKIPPED) if file.suffix == ".py"]
    # A few deliberately odd files are not UTF-8; the user cannot help that, so pass them over.
    texts = [text for file in files if (text := _decode(file.read_bytes())) is not None]
    if not texts:
        raise UltraMemError(
            f"no Python sources under {root}: this Python comes without them. "
            "Give text of your own with --text PATH (a file or a folder)."
        )
    version = sysconfig.get_python_version()
    skipped = len(files) - len(texts)
    return Corpus(f"Python {version} standard library", len(texts), skipped, tuple(texts))


def _from_path(path: Path) -> Corpus:
    if not path.exists():
        raise UltraMemError(f"--text {path}: no such file or folder. Give an existing one.")
    files = [path] if path.is_file() else list(_walk(path, frozenset({"__pycache__"})))
    if not files:
        raise UltraMemError(f"--text {path}: the folder holds no files (hidden ones do not count).")
    required = path.is_file()
    read = [_read(file, required or file.suffix.lower() in TEXT_SUFFIXES) for file in files]
    texts = tuple(text for text in read if text is not None and text.strip())
    if not texts:
        raise UltraMemError(
            f"--text {path}: no text in {len(files)} file(s): all are empty or not UTF-8 text."
        )
    return Corpus(str(path), len(texts), len(files) - len(texts), texts)


def _walk(root: Path, skipped: frozenset[str]) -> Iterator[Path]:
    """All visible regular files below `root`, sorted, so that every machine sees one order."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(s for s in subfolders if s not in skipped and s[0] != ".")
        for name in sorted(names):
            file = Path(folder, name)
            if name[0] != "." and file.is_file():
                yield file


def _read(file: Path, required: bool) -> str | None:
    raw = file.read_bytes()
    text = _decode(raw)
    if text is None and required:
        raise UltraMemError(f"--text: {file} {_why_not_text(raw)}")
    return text


def _decode(raw: bytes) -> str | None:
    if b"\0" in raw:
        return None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _why_not_text(raw: bytes) -> str:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}"
    else:
        problem = f"is not text: zero byte at offset {raw.index(0)}"
    return (
        f"{problem}. Convert it (for Latin-1: iconv -f latin1 -t utf-8 OLD > NEW) "
        "or take it out of the folder."
    )
