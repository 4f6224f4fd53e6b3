"""kill -9 at every file operation of a save: the newest complete checkpoint loads, losses go on.

An audit hook sees each file that a rank, or the process that writes its shard, is about to create,
open for writing or rename, and kills both before the n-th of them.
"""

import contextlib
import functools
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import RanksFailed
from tests.training_runs import IN_BACKGROUND, run_pretrain, tiny_gpt
from ultramem_megatron.faults import integrity

_FLAGS = {
    "ultramem_spans": "1:2",
    "ultramem_num_keys": 12,
    "ultramem_topk": 6,
    "ckpt_format": "torch_dist",
    "verify_integrity": True,
    "save_interval": 2,
    "train_iters": 6,
}
_WATCHED = "iter_0000004"
_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.move"}


def _train(**changes):
    return run_pretrain(2, tiny_gpt(**{**_FLAGS, **changes}))


def killed_before(folder: str, watched: str, kill_at: int | None) -> None:
    """In every rank: operations on paths with `watched` go into one journal; the n-th kills."""
    journal = os.path.join(folder, "operations")

    def hook(event: str, arguments: tuple) -> None:
        if not _writes(event, arguments):
            return
        path = os.fsdecode(arguments[0])
        is_tracker = path.endswith(integrity.TRACKER) and os.path.exists(journal)
        if watched not in path and not is_tracker:
            return
        out = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(out, f"{event} {path}\n".encode())
        os.close(out)
        with open(journal, "rb") as operations:
            # Not ==: two ranks may write before either counts.
            if kill_at is not None and len(operations.readlines()) >= kill_at:
                os.killpg(0, signal.SIGKILL)  # the rank and its writer

    sys.addaudithook(hook)


def _writes(event: str, arguments: tuple) -> bool:
    if event == "open":
        path, _, flags = arguments
        return isinstance(path, (str, bytes)) and bool(flags & (os.O_WRONLY | os.O_RDWR))
    return event in _CHANGES


@pytest.fixture(scope="module")
def undisturbed():
    return _train(save_interval=None).losses


@pytest.mark.parametrize(
    "background",
    [
        pytest.param({}, id="synchronous"),
        pytest.param(IN_BACKGROUND, id="asynchronous", marks=pytest.mark.long),
    ],
)
def test_a_save_killed_at_any_of_its_operations(background, tmp_path, undisturbed):
    whole = tmp_path / "whole"
    whole.mkdir()
    operations = len(_killed(whole, None, background))
    assert operations >= 9  # folder, shards, metadata, sums, tracker
    resumed_at = []
    for kill_at in range(1, operations + 1):
        folder = tmp_path / str(kill_at)
        folder.mkdir()
        assert len(_killed(folder, kill_at, background)) >= kill_at
        checkpoints = folder / "checkpoints"
        again = _train(load=checkpoints, save=checkpoints, **background)
        assert again.losses == undisturbed[-len(again.losses) :]
        resumed_at.append(6 - len(again.losses))
        assert (checkpoints / integrity.TRACKER).read_text() == "6"
        assert integrity.newest_whole(checkpoints) == 6
        shutil.rmtree(folder)
    # Before the tracker names it, an iteration does not count; cut short, the files speak.
    assert set(resumed_at[:-1]) == {2}, resumed_at
    assert resumed_at[-1] == 4, resumed_at


def _killed(folder: Path, kill_at: int | None, changes: dict[str, Any]) -> list[str]:
    """The operations of the save of iteration 4, up to where it was killed."""
    arguments = tiny_gpt(**{**_FLAGS, "save": folder / "checkpoints", **changes})
    before = functools.partial(killed_before, str(folder), _WATCHED, kill_at)
    killed = contextlib.nullcontext() if kill_at is None else pytest.raises(RanksFailed)
    with killed:
        run_pretrain(2, arguments, before=before)
    return operations_of(folder)


def operations_of(folder: Path) -> list[str]:
    """What `killed_before` saw."""
    return (folder / "operations").read_text().splitlines()
