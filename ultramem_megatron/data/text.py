"""Plain text: one's own files, or the Python standard library's, read a few megabytes at a time.

The standard library is the default because it is on every machine that can run this project, it
is real text (code, comments and docstrings, some 10 MB), and reading it needs no network.
"""

import codecs
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from ultramem_megatron.data.files import Found, walk
from ultramem_megatron.errors import UltraMemError

# Files with these endings are text by intent: one that is not UTF-8 is an error. Any other file
# is used when it happens to be UTF-8 text and passed over when it is not (pictures, archives).
TEXT_SUFFIXES = frozenset({".csv", ".html", ".json", ".jsonl", ".md", ".py", ".rst", ".txt"})

# Not the library's own prose: other people's packages, test data whose presence depends on how
# Python was packaged, and character tables.
STDLIB_SKIPPED = frozenset(
    {"__pycache__", "dist-packages", "encodings", "idle_test", "site-packages", "test", "tests"}
)

BLOCK = 4 << 20  # bytes read at a time
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class NotTextError(Exception):
    """A file is not UTF-8 text; says which byte is not."""


def read_text(file: Path) -> Iterator[str]:
    """The text of a file in pieces, without byte order mark, lines ending in line feeds.

    Raises:
        NotTextError: a byte is not UTF-8 or zero; pieces may have come before.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    first, held, done = True, "", 0
    with file.open("rb") as opened:
        while block := opened.read(BLOCK):
            text = held + _decode(decoder, block, done, final=False)
            done += len(block)
            if first and text:
                text, first = text.removeprefix("\ufeff"), False
            held = "\r" if text.endswith("\r") else ""  # its line feed may come next
            yield text.removesuffix("\r").replace("\r\n", "\n")
    yield held + _decode(decoder, b"", done, final=True)


def _decode(decoder: codecs.IncrementalDecoder, block: bytes, offset: int, final: bool) -> str:
    try:
        text = decoder.decode(block, final)
    except UnicodeDecodeError as error:
        byte, start = error.object[error.start], error.start
        at = offset + len(block) - len(error.object) + start  # bytes may be left from before
        problem = f"is not UTF-8: byte 0x{byte:02x} at offset {at}"
        encoding = "utf-16" if at == 0 and block[:2] in _UTF_16 else "latin1"
        raise NotTextError(_advice(problem, encoding)) from None
    if b"\0" in block:
        raise NotTextError(_advice(f"is not text: zero byte at offset {offset + block.index(0)}"))
    return text


def _advice(problem: str, encoding: str = "latin1") -> str:
    name = {"latin1": "Latin-1", "utf-16": "UTF-16"}[encoding]
    return (
        f"{problem}. Convert it (for {name}: iconv -f {encoding} -t utf-8 OLD > NEW) "
        "or take it out of the folder."
    )


def must_be_text(file: Path) -> bool:
    """Whether a file in a folder is text by intent."""
    return file.suffix.lower() in TEXT_SUFFIXES


def standard_library(found: Found) -> Iterator[Path]:
    """Python sources of the standard library.

    Raises:
        UltraMemError: this Python has none.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for file in walk(root, found, STDLIB_SKIPPED) if file.suffix == ".py"]
    if not files:
        raise UltraMemError(
            f"no Python sources under {root}: this Python comes without them. "
            "Give text of your own with --text PATH (a file or a folder)."
        )
    yield from files


def split_text(chunks: Iterable[str], limit: int) -> Iterator[str]:
    """Cuts a text, given in chunks of any length, into pieces of at most `limit` characters.

    A piece ends after a blank line where one lies in its second half, else after a line, else
    anywhere, so that a document rarely starts in the middle of a sentence.
    """
    rest = ""
    for chunk in chunks:
        rest += chunk
        start = 0
        while len(rest) - start > limit:
            stop = _boundary(rest, start, limit)
            yield rest[start:stop]
            start = stop
        rest = rest[start:]
    if rest:
        yield rest


def _boundary(text: str, start: int, limit: int) -> int:
    stop = start + limit
    for boundary in ("\n\n", "\n"):
        found = text.rfind(boundary, start + limit // 2, stop)
        if found >= 0:
            return found + len(boundary)
    return stop
