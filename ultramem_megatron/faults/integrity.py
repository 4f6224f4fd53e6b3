"""Is a checkpoint whole? Sums over its files, checked before anything in them is read.

integrity.json has the SHA-256 of every file of an iteration: each rank sums what it writes, and
rank 0 writes the list when all files are there, before latest_checkpointed_iteration.txt names the
iteration. Each rank checks a share of them before they are read, once for each start; a damaged
checkpoint is refused with the newest older one that is whole.

    ultramem integrity CHECKPOINTS     # every iteration: whole, damaged, no sums
"""

import argparse
import functools
import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ultramem_megatron.errors import CommandParser, UltraMemError, exit_on_user_error
from ultramem_megatron.faults.manifest import MANIFEST, ManifestError, read_sums, sum_of
from ultramem_megatron.faults.shares import Share, launched_share

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
"""Megatron's name for weights without a training state; a run that loads them starts at 0."""
_PREFIX = "iter_"


class DamagedCheckpointError(UltraMemError):
    """Files of a checkpoint are missing or not what was written; the message names them."""


def _fault(file: Path, expected: str) -> str | None:
    try:
        found = sum_of(file)
    except OSError as error:
        return f"{file.name}: {error.strerror}"
    return None if found == expected else f"{file.name}: contents changed since it was saved"


def has_sums(folder: Path) -> bool:
    """Whether an iteration was saved with sums."""
    return (folder / MANIFEST).exists()


@functools.cache
def verify(folder: Path, share: Share = Share()) -> int:  # noqa: B008 - a constant
    """Check the files of an iteration's folder against their sums; returns their number.

    share: the files to check. A success is remembered: a second check costs nothing.

    Raises:
        DamagedCheckpointError: the sums are missing or unreadable, or files do not match them.
    """
    try:
        sums = read_sums(folder)
    except ManifestError as error:
        raise DamagedCheckpointError(f"{folder}: {error}.") from None
    # hashlib lets go of the interpreter lock.
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        faults = list(pool.map(lambda name: _fault(folder / name, sums[name]), share.of(sums)))
    named = [fault for fault in faults if fault is not None]
    if named:
        raise DamagedCheckpointError(f"{folder} is damaged: {'; '.join(named)}.")
    return len(sums)


def iterations(checkpoints: Path) -> list[int]:
    """Iterations that have a folder, finished or not, newest first."""
    names = (path.name.removeprefix(_PREFIX) for path in checkpoints.glob(f"{_PREFIX}*"))
    return sorted((int(name) for name in names if is_number(name)), reverse=True)


def is_number(text: str) -> bool:
    """Whether it is the number of an iteration: digits as Megatron writes them."""
    return text.isascii() and text.isdecimal() and len(text) < 19


def read_tracker(tracker: Path) -> str:
    """What a tracker file says; bytes that are no text are shown as such."""
    return tracker.read_bytes().decode(errors="backslashreplace").strip()


def iteration_folder(checkpoints: Path, iteration: int | str) -> Path:
    """Where Megatron puts an iteration, given as a number or in the words of a tracker file."""
    if iteration == RELEASE:
        return checkpoints / RELEASE
    return checkpoints / f"{_PREFIX}{int(iteration):07d}"


def newest_whole(
    checkpoints: Path, before: int | None = None, check: Callable[[Path], object] = verify
) -> int | None:
    """The newest iteration (older than `before`, if given) whose files all match their sums.

    check: raises DamagedCheckpointError where they do not.
    """
    for iteration in iterations(checkpoints):
        if before is None or iteration < before:
            try:
                check(iteration_folder(checkpoints, iteration))
            except DamagedCheckpointError:
                continue
            return iteration
    return None


def repair_tracker(checkpoints: Path) -> None:
    """Point a tracker file that was cut while it was written to the newest whole iteration.

    Raises DamagedCheckpointError where none is whole.
    """
    tracker = checkpoints / TRACKER
    if tracker.is_file():
        _repair(tracker)


def check_iteration(folder: Path, flag: str = "--load") -> None:
    """Refuse a damaged iteration before it is read: what this process sees in its share of files.

    flag: the one that named the folder.

    Raises:
        DamagedCheckpointError: names the damaged files and the newest older checkpoint.
    """
    try:
        verify(folder, launched_share())
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"{flag} {folder.parent}: {error} {way_out(folder)}") from None


def check_before_reading(folder: Path, flag: str = "--load") -> None:
    """As `check_iteration`, where there are sums, to decode or to convert.

    Rank 0 alone checks its share here: when it ends, torchrun ends the others. They check theirs
    when the weights are loaded.
    """
    if os.environ.get("RANK", "0") == "0" and has_sums(folder):
        check_iteration(folder, flag)


def way_out(folder: Path, check: Callable[[Path], object] = verify) -> str:
    """What to do about a damaged iteration. check: as for `newest_whole`."""
    if not has_sums(folder):
        return "Where it was saved without sums, start once with --no-verify-integrity."
    if folder.name == RELEASE:
        return "Write it anew, or give another --load."
    older = newest_whole(folder.parent, int(folder.name.removeprefix(_PREFIX)), check)
    if older is None:
        return "No older checkpoint there is whole. Give another --load, or start without."
    return f"Iteration {older} is whole: go on from it with --ckpt-step {older}."


def _repair(tracker: Path) -> None:
    """Point a tracker that does not name an iteration to the newest whole one."""
    text = read_tracker(tracker)
    if is_number(text) or text == RELEASE:
        return
    newest = newest_whole(tracker.parent)
    if newest is None:
        raise DamagedCheckpointError(
            f"{tracker} says {text!r:.80}, which is no iteration, and no checkpoint beside it is "
            f"whole. Give another --load, or start without."
        )
    write_tracker(tracker, newest)
    print(
        f"{tracker} said {text!r:.80}: it now names {newest}, the newest whole checkpoint.",
        flush=True,
    )


def write_tracker(tracker: Path, iteration: int) -> None:
    """Name an iteration as the latest, at once or not at all."""
    unfinished = tracker.with_suffix(f".{socket.gethostname()}-{os.getpid()}.tmp")
    unfinished.write_text(str(iteration))
    unfinished.replace(tracker)


def _described(checkpoints: Path, iteration: int) -> str:
    folder = iteration_folder(checkpoints, iteration)
    if not has_sums(folder):
        return "no sums: unfinished, or saved without"
    try:
        return f"whole ({verify(folder)} files)"
    except DamagedCheckpointError as error:
        return str(error)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the state of every iteration. Raises UltraMemError where there is none."""
    parser = CommandParser(
        prog="ultramem integrity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoints", type=Path, help="the folder given as --save")
    checkpoints = parser.parse_args(argv).checkpoints
    found = iterations(checkpoints)
    if not found:
        raise UltraMemError(f"{checkpoints}: no {_PREFIX}* folders. Give the folder of --save.")
    for iteration in found:
        print(f"{iteration:8d}  {_described(checkpoints, iteration)}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
