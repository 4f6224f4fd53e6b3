"""A complete iteration is never written again in place: a new one is made beside it and swapped.

A run writes an iteration that is there where it goes on from an older one (--ckpt-step), starts
anew in the folder of another, or has nothing left to train. Killed halfway in place, it would leave
neither the old nor the new.
"""

import shutil
from pathlib import Path

_NEW, _OLD = "rewriting_", "replaced_"


def is_complete(iteration: Path) -> bool:
    """Whether all of it was written once: metadata.json is the last of its files but the sums."""
    return (iteration / "metadata.json").is_file()


def beside(iteration: Path) -> Path:
    """An empty folder in which to write a complete iteration again."""
    new = iteration.with_name(_NEW + iteration.name)
    if new.exists():
        shutil.rmtree(new)
    new.mkdir()
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
    for old in checkpoints.glob(f"{_OLD}iter_*"):
        iteration = checkpoints / old.name.removeprefix(_OLD)
        if iteration.exists():
            shutil.rmtree(old)
        else:
            old.rename(iteration)
    for new in checkpoints.glob(f"{_NEW}iter_*"):
        shutil.rmtree(new)
