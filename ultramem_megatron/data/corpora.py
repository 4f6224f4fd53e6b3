"""Fetches real text from Debian's archive: two dictionaries, some 30 MB of prose and definitions.

    ultramem data corpora --output DIR

DIR then holds `text/` (gcide.txt: Webster's dictionary of 1913 with additions; wordnet.txt: glosses
and examples; stdlib.txt: the Python standard library) for `ultramem data prepare --text DIR/text`,
and `definitions.tsv` (noun TAB definition). Nothing is installed and root is not needed. Licences:
GCIDE GPL, WordNet its own permissive one; the texts are fetched and never part of this project.
"""

import contextlib
import gzip
import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ultramem_megatron.data import text
from ultramem_megatron.data.files import Found
from ultramem_megatron.data.own_folder import OwnFolder, sizes
from ultramem_megatron.data.progress import say
from ultramem_megatron.errors import CommandParser, UltraMemError

FORMAT = 1  # raise it when the same packages would be turned into other text
MANIFEST = "corpora.json"
PACKAGES = ("dict-gcide", "wordnet-base")
PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
DEFINITION_LENGTHS = range(15, 121)  # characters; of nouns in definitions.tsv

GCIDE, GCIDE_INDEX = "usr/share/dictd/gcide.dict.dz", "usr/share/dictd/gcide.index"
WORDNET = "usr/share/wordnet"
# SHA-256 of what is read, in the editions dict-gcide 0.48.5 and wordnet-base 3.0.
CHECKSUMS = {
    GCIDE: "3e6b2cdcbc1b3664c2f1466e3c8e44012e815c4c67fa83fa61f39777cd6e8517",
    GCIDE_INDEX: "e78de035e075f16dd686dd87a4dbf5b4525130d0550968a02d929f5ddf63a6a1",
    f"{WORDNET}/data.noun": "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2",
    f"{WORDNET}/data.verb": "adcf43e35b581e8036d8b5a52d63d9cd3d3b4870b2720d3c03c799df44777bc2",
    f"{WORDNET}/data.adj": "c89120dfc1f046ddff4a631bf9b7e9fa1a36b5e86565a23bf82dbe14f30b88a7",
    f"{WORDNET}/data.adv": "444a63bf3955080ab7524f5079cfc07ff9bc682cb98bdb1db73b0fb9829f1139",
}

_DICTD_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def fetch(output: Path, *, any_edition: bool = False) -> Path:
    """Fills `output` unless an earlier call did; returns the folder of text.

    any_edition: take the dictionaries whatever their checksums.

    Raises:
        UltraMemError: the packages cannot be fetched, or are of another edition.
    """
    wanted = {"format": FORMAT, "any_edition": any_edition}
    folder = OwnFolder(output, MANIFEST, wanted)
    with folder.locked(lambda: say(f"waiting for another call that fills {output}")):
        found = folder.read()
        if found is not None and _is_whole(output, found, wanted):
            return output / "text"
        with folder.building() as built:
            with TemporaryDirectory(dir=built) as packages:
                _write(_unpacked(Path(packages)), built, any_edition)
            folder.publish(built, wanted)
    return output / "text"


def _is_whole(output: Path, found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    present = found["sizes"].items() <= sizes(output).items()
    return present and {key: found[key] for key in wanted} == wanted


def _write(root: Path, output: Path, any_edition: bool) -> None:
    """Turns the unpacked packages below `root` into the files of `output`."""
    if not any_edition:
        check(root)
    (output / "text").mkdir()
    glosses = list(wordnet_glosses(root))
    for name, lines in (
        ("gcide", gcide_entries(root)),
        ("wordnet", (f"{', '.join(words)}: {gloss}" for words, _, gloss in glosses)),
        ("stdlib", _standard_library()),
    ):
        (output / "text" / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pairs = "".join(f"{word}\t{gloss}\n" for word, gloss in noun_definitions(glosses))
    (output / "definitions.tsv").write_text(pairs, encoding="utf-8")


def _standard_library() -> Iterator[str]:
    for file in text.standard_library(Found("")):
        with contextlib.suppress(text.NotTextError):
            yield "".join(text.read_text(file))


def check(root: Path) -> None:
    """Raises UltraMemError unless the unpacked files are those whose checksums are known."""
    for name, expected in CHECKSUMS.items():
        found = hashlib.sha256((root / name).read_bytes()).hexdigest()
        if found != expected:
            raise UltraMemError(
                f"{name} has SHA-256 {found}, not {expected}: this machine's archive has another "
                f"edition, and results would not compare. Use Debian 12, or take it "
                "as it is with --any-edition."
            )


def _unpacked(folder: Path) -> Path:
    """Downloads the packages (apt checks their signatures) and unpacks them in `folder`."""
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise UltraMemError(
            f"{' and '.join(missing)} not found: the dictionaries come from Debian's or Ubuntu's "
            "archive. Fetch on such a machine and copy the output folder, or train on text of "
            "your own."
        )
    _call(["apt-get", "download", "-q", *PACKAGES], folder)
    for package in sorted(folder.glob("*.deb")):
        _call(["dpkg-deb", "-x", package.name, "root"], folder)
    return folder / "root"


def _call(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
        raise UltraMemError(
            f"{' '.join(command)} failed: {' / '.join(last)}. It needs the network and a package "
            "list (`apt-get update`, once, as root). Where there is none, copy a folder that this "
            "command has filled elsewhere."
        )


def gcide_entries(root: Path) -> Iterator[str]:
    """One line for each entry, without markup: `headword: text`."""
    whole = gzip.decompress((root / GCIDE).read_bytes())
    index = (root / GCIDE_INDEX).read_text(encoding="utf-8", errors="replace")
    heads: dict[tuple[int, int], str] = {}
    for line in index.splitlines():
        word, first, size = line.split("\t")[:3]
        if not word.startswith("00"):  # the database's own information
            heads.setdefault((_dictd_number(first), _dictd_number(size)), word)
    for (offset, length), word in sorted(heads.items()):
        entry = whole[offset : offset + length].decode("utf-8", "replace")
        body = " ".join(_without_markup(entry).split())
        if len(body) > 20:
            yield f"{word}: {body}"


def _without_markup(entry: str) -> str:
    """An entry without source tags, cross-reference braces, and its line of head and etymology."""
    entry = re.sub(r"\[(1913 Webster|PJC|WordNet [\d.]+|[^\]]{0,30}Webster)[^\]]*\]", "", entry)
    _, _, body = re.sub(r"[{}]", "", entry).partition("\n")
    return body


def _dictd_number(digits: str) -> int:
    """A number of dictd's index, base 64."""
    number = 0
    for digit in digits:
        number = number * 64 + _DICTD_DIGITS.index(digit)
    return number


def wordnet_glosses(root: Path) -> Iterator[tuple[list[str], str, str]]:
    """Words, part of speech, and the gloss with its examples, of every synset."""
    for part in PARTS_OF_SPEECH:
        file = root / WORDNET / f"data.{part}"
        for line in file.read_text(encoding="latin-1").splitlines():
            if line.startswith("  "):  # the licence
                continue
            fields, gloss = line.split(" | ", 1)
            words = fields.split()[4 : 4 + 2 * int(fields.split()[3], 16) : 2]
            clean = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words]
            yield clean, part, gloss.strip()


def noun_definitions(glosses: Sequence[tuple[list[str], str, str]]) -> Iterator[tuple[str, str]]:
    """Nouns in the order of the dictionary with a definition of their own, each once."""
    words: set[str] = set()
    definitions: set[str] = set()
    for (word, *_), part, gloss in glosses:
        definition = gloss.split(";")[0].strip()
        if part != "noun" or len(definition) not in DEFINITION_LENGTHS:
            continue
        if word not in words and definition not in definitions:
            words.add(word)
            definitions.add(definition)
            yield word, definition


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = CommandParser(
        prog="ultramem data corpora",
        description="Fetch dictionaries from Debian's archive as text to train on.",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to fill")
    parser.add_argument(
        "--any-edition", action="store_true", help="take dictionaries with unknown checksums"
    )
    try:
        args = parser.parse_args(argv)
        folder = fetch(args.output, any_edition=args.any_edition)
    except (UltraMemError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for file in (*sorted(folder.iterdir()), args.output / "definitions.tsv"):
        print(f"{file}  {file.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
