"""A complete iteration is never written again in place: a new one is made beside it and swapped.

A run writes an iteration that is there where it goes on from an older one (--ckpt-step), starts
anew in the folder of another, or has nothing left to train. Killed halfway in place, it would leave
neither the old nor the new.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ultramem_megatron.errors import UltraMemError

_NEW, _OLD = "ultramem_rewriting_", "ultramem_replaced_"
_ITERATION = re.compile(r"iter_\d{7,}")


def is_complete(iteration: Path) -> bool:
    """Whether all of it was written once: metadata.json is the last of its files but the sums."""
    return (iteration / "metadata.json").is_file()


def beside(iteration: Path) -> Path:
    """An empty folder in which to write a complete iteration again.

    Raises UltraMemError: its place is taken by what a training did not make.
    """
    new = iteration.with_name(_NEW + iteration.name)
    if _is_ours(new, _NEW):
        shutil.rmtree(new)
    try:
        new.mkdir()
    except FileExistsError:
        raise UltraMemError(f"{new} was not made by a training: move it away.") from None
    return new


def swap(iteration: Path) -> None:
    """Put what was written beside a complete iteration in its place."""
    old = iteration.with_name(_OLD + iteration.name)
    iteration.rename(old)
    iteration.with_name(_NEW + iteration.name).rename(iteration)
    shutil.rmtree(old)


def finish_swaps(checkpoints: Path) -> None:
    """After a run that was killed: an iteration between two names gets its own, leavings go.

    Only for who holds the folder (`run_lock`).
    """
    for old in _leavings(checkpoints, _OLD):
        iteration = checkpoints / old.name.removeprefix(_OLD)
        if iteration.exists():
            shutil.rmtree(old)
        else:
            old.rename(iteration)
    for new in _leavings(checkpoints, _NEW):
        shutil.rmtree(new)


def _leavings(checkpoints: Path, prefix: str) -> Iterator[Path]:
    return (path for path in checkpoints.glob(f"{prefix}*") if _is_ours(path, prefix))


def _is_ours(path: Path, prefix: str) -> bool:
    """Whether a training made it, by its name; what others put beside iterations stays."""
    named = _ITERATION.fullmatch(path.name.removeprefix(prefix)) is not None
    return named and path.is_dir() and not path.is_symlink()
