"""What preparing text costs, as it grows and over processes.

    [MEGATRON_LM_PATH=../Megatron-LM] ultramem bench data --out DIR [--quick]

Invented words in JSON lines, of growing size, through `ultramem data prepare` with one process that
encodes and with one for each core: vocabulary, encoding, shuffle, counts and sums. Where
MEGATRON_LM_PATH names a checkout, its tools/preprocess_data.py encodes the same text with the
vocabulary then known. Files of any number of processes must be the same. Writes DIR/data.csv.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch.benchmarks.environment import environment_columns
from ultramem_megatron.data.prepare import load
from ultramem_megatron.errors import CommandParser, UltraMemError, exit_on_user_error
from ultramem_megatron.faults.results_folder import results_folder
from ultramem_megatron.tools.rows import write_as_made

_MEGABYTES = (4, 16, 64)
_WORDS, _LETTERS = 50_000, "etaoinshrdlucmfw"
_DOCUMENT = 400  # words
_VOCABULARY = 8192
_LOOK_SECONDS = 0.05  # between looks at how much memory is taken
_OURS, _UPSTREAMS = "ultramem data prepare", "Megatron's preprocess_data.py, vocabulary given"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = CommandParser(
        prog="ultramem bench data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for data.csv and what is prepared")
    add("--quick", action="store_true", help="one megabyte, one process")
    options = parser.parse_args(argv)
    sizes, workers = ((1,), [1]) if options.quick else (_MEGABYTES, _workers())
    script = _upstreams_script()
    results_folder(options.out)
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        write_as_made(options.out / "data.csv", _rows(sizes, workers, script, Path(folder)))
    print(options.out / "data.csv")


def _workers() -> list[int]:
    return sorted({1, len(os.sched_getaffinity(0))})


def _upstreams_script() -> Path | None:
    """Raises UltraMemError where MEGATRON_LM_PATH names no checkout."""
    checkout = os.environ.get("MEGATRON_LM_PATH")
    if not checkout:
        print("MEGATRON_LM_PATH is not set: without Megatron's preprocess_data.py")
        return None
    script = Path(checkout).resolve() / "tools" / "preprocess_data.py"
    if not script.is_file():
        raise UltraMemError(
            f"MEGATRON_LM_PATH={checkout}: there is no {script}. Give a checkout of Megatron-LM."
        )
    return script


def _rows(
    sizes: Sequence[int], workers: Sequence[int], script: Path | None, folder: Path
) -> Iterator[dict[str, Any]]:
    environment = environment_columns()
    for megabytes in sizes:
        text = folder / f"{megabytes}.jsonl"
        _write_text(text, megabytes)
        outputs = {count: folder / f"{megabytes}-{count}" for count in workers}
        commands = {(_OURS, count): _ours(text, out, count) for count, out in outputs.items()}
        if script is not None:
            vocabulary = next(iter(outputs.values())) / "tokenizer"
            for count in workers:
                upstreams = _upstreams(script, text, vocabulary, folder / "upstream", count)
                commands[_UPSTREAMS, count] = upstreams
        for (program, count), command in commands.items():
            seconds, largest = _run(command)
            row = {
                "text_bytes": text.stat().st_size,
                "program": program,
                "workers": count,
                "seconds": round(seconds, 2),
                "bytes_per_second": round(text.stat().st_size / seconds),
                "largest_process_bytes": largest,
            }
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            yield {**row, **environment}
        if len({_fingerprint(out) for out in outputs.values()}) > 1:
            raise AssertionError("files depend on the number of processes")


def _ours(text: Path, output: Path, workers: int) -> list[str]:
    words = ["--text", text, "--json-key", "text", "--output", output, "--workers", workers]
    command = [sys.executable, "-m", "ultramem_megatron", "data", "prepare", *map(str, words)]
    return [*command, "--vocab-size", str(_VOCABULARY)]


def _upstreams(script: Path, text: Path, vocabulary: Path, output: Path, workers: int) -> list[str]:
    words = ["--input", text, "--output-prefix", output, "--workers", workers, "--append-eod"]
    words += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", vocabulary]
    return [sys.executable, str(script), *map(str, words)]


def _run(command: Sequence[str]) -> tuple[float, int]:
    """Seconds, and bytes of the largest of its processes."""
    begun, largest = time.perf_counter(), 0
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        while process.poll() is None:
            largest = max(largest, *_peaks(process.pid))
            time.sleep(_LOOK_SECONDS)
        seconds = time.perf_counter() - begun
        if process.returncode:
            output.seek(0)
            raise UltraMemError(f"{' '.join(command)} failed: {output.read().decode()[-2000:]}")
    return seconds, largest


def _peaks(session: int) -> Iterator[int]:
    """Peak bytes of each process of a session that lives; 0 as well."""
    yield 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            # After the name, which may hold anything: state, parent, group, session.
            own = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
            found = re.search(r"VmHWM:\s*(\d+) kB", (folder / "status").read_text())
            if own == session and found:
                yield int(found[1]) * 1024


def _write_text(file: Path, megabytes: int) -> None:
    """Documents of invented words, some far more often than others, the same in each run."""
    draw = np.random.default_rng(megabytes)
    letters = np.array(list(_LETTERS))
    words = ["".join(draw.choice(letters, draw.integers(2, 11))) for _ in range(_WORDS)]
    with file.open("w") as opened:
        while opened.tell() < megabytes * 1_000_000:
            ranks = draw.zipf(1.2, _DOCUMENT) % _WORDS
            document = {"text": " ".join(words[rank] for rank in ranks)}
            opened.write(json.dumps(document) + "\n")


def _fingerprint(folder: Path) -> str:
    """Of what training reads."""
    assert load(folder) is not None, "prepared in part"
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.bin")):
        found.update(file.read_bytes())
    return found.hexdigest()


if __name__ == "__main__":
    with exit_on_user_error():
        main()
