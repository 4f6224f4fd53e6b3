"""Disks that fill up and memory that does not suffice: the run ends and says what to do."""

import contextlib
import functools
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys

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


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True, text=True
    )
    if made.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def _fill(folder: str) -> None:
    with open(f"{folder}/filler", "ab", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))


def _fill_when_created(folder: str, what: str) -> None:
    """In every rank: once a path that ends in `what` is about to be made, the disk is full."""

    def hook(event, arguments):
        if event == "os.mkdir" and str(arguments[0]).endswith(what):
            _fill(folder)

    sys.addaudithook(hook)


@pytest.mark.parametrize("background", [{}, IN_BACKGROUND], ids=["synchronous", "asynchronous"])
def test_a_checkpoint_that_does_not_fit(small_disk, background):
    undisturbed = run_pretrain(2, tiny_gpt(**{**_FLAGS, "save_interval": None})).losses
    checkpoints = small_disk / "checkpoints"
    flags = tiny_gpt(**_FLAGS, save=checkpoints, load=checkpoints, load_or_start=True, **background)
    before = functools.partial(_fill_when_created, str(small_disk), "iter_0000004")
    with pytest.raises(RanksFailed, match="No space left on device") as ended:
        run_pretrain(2, flags, before=before)
    assert f"this run writes to --save {checkpoints} (0.000 GB free)" in str(ended.value)
    assert integrity.newest_whole(checkpoints) == 2
    (small_disk / "filler").unlink()
    assert run_pretrain(2, flags).losses == undisturbed[2:]


def _remount(folder, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


def _lock_when_created(folder: str, what: str) -> None:
    """In every rank: once a path that ends in `what` is about to be made, nothing can be."""

    def hook(event, arguments):
        if event == "os.mkdir" and str(arguments[0]).endswith(what):
            subprocess.run(["mount", "-o", "remount,ro", folder])

    sys.addaudithook(hook)


def test_a_folder_that_cannot_be_written_to_from_the_start(small_disk):
    flags = tiny_gpt(**_FLAGS, save=small_disk / "checkpoints")
    _fill(str(small_disk))
    with pytest.raises(RanksFailed, match=r"checkpoints cannot be written to: No space left"):
        run_pretrain(1, flags)
    (small_disk / "filler").unlink()
    _remount(small_disk, "ro")
    with pytest.raises(RanksFailed, match=r"checkpoints cannot be written to: Read-only file sys"):
        run_pretrain(1, flags)
    _remount(small_disk, "rw")
    assert len(run_pretrain(1, flags).losses) == 6


@pytest.mark.long
@pytest.mark.parametrize("background", [{}, IN_BACKGROUND], ids=["synchronous", "asynchronous"])
def test_a_folder_that_becomes_read_only(small_disk, background):
    undisturbed = run_pretrain(2, tiny_gpt(**{**_FLAGS, "save_interval": None})).losses
    checkpoints = small_disk / "checkpoints"
    flags = tiny_gpt(**_FLAGS, save=checkpoints, load=checkpoints, load_or_start=True, **background)
    before = functools.partial(_lock_when_created, str(small_disk), "iter_0000004")
    with pytest.raises(RanksFailed, match="Read-only file system"):
        run_pretrain(2, flags, before=before)
    _remount(small_disk, "rw")
    assert integrity.newest_whole(checkpoints) == 2
    assert run_pretrain(2, flags).losses == undisturbed[2:]


def _fill_after_scalars(folder: str, count: int) -> None:
    """In every rank: the disk is full before the `count`-th scalar is written."""
    from torch.utils.tensorboard import SummaryWriter

    add, done = SummaryWriter.add_scalar, [0]

    def add_scalar(*args, **kwargs):
        done[0] += 1
        if done[0] == count:
            _fill(folder)
        return add(*args, **kwargs)

    SummaryWriter.add_scalar = add_scalar  # type: ignore[method-assign]  # the fault


def test_events_that_do_not_fit(small_disk):
    events = small_disk / "events"
    flags = tiny_gpt(
        **{
            **_FLAGS,
            "save_interval": None,
            "train_iters": 400,
            "tensorboard_dir": events,
            "tensorboard_log_interval": 1,
        }
    )
    before = functools.partial(_fill_after_scalars, str(small_disk), 100)
    with pytest.raises(RanksFailed, match="No space left on device") as ended:
        run_pretrain(1, flags, before=before)
    assert f"--tensorboard-dir {events} (0.000 GB free)" in str(ended.value)


def _lose_folder_after_scalars(folder: str, count: int) -> None:
    """In every rank: the folder is gone before the `count`-th scalar is written."""
    from torch.utils.tensorboard import SummaryWriter

    add, done = SummaryWriter.add_scalar, [0]

    def add_scalar(self, *args, **kwargs):
        done[0] += 1
        if done[0] == count:
            self.flush()
            shutil.rmtree(folder)
        return add(self, *args, **kwargs)

    SummaryWriter.add_scalar = add_scalar  # type: ignore[method-assign]  # the fault


def test_a_folder_of_events_that_vanishes_does_not_end_a_run(tmp_path):
    flags = tiny_gpt(tensorboard_dir=tmp_path / "events", tensorboard_log_interval=1)
    before = functools.partial(_lose_folder_after_scalars, str(tmp_path / "events"), 10)
    assert len(run_pretrain(1, flags, before=before).losses) == 3
    assert list((tmp_path / "events").glob("events.out.tfevents.*"))


def _hide_shared_memory() -> None:
    """In this rank alone /dev/shm has a single page, less than two workers' locks take."""
    multiprocessing.set_start_method("fork", force=True)  # as in a rank that torchrun starts
    os.unshare(os.CLONE_NEWNS)
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", "/dev/shm"]
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(mount, check=True)


def test_shared_memory_is_told_apart_from_disks(small_disk):
    checkpoints = small_disk / "checkpoints"
    flags = tiny_gpt(**_FLAGS, save=checkpoints)
    flags[flags.index("--num-workers") + 1] = "2"
    with pytest.raises(RanksFailed, match="No space left on device") as ended:
        run_pretrain(1, flags, before=_hide_shared_memory)
    assert "no room in shared memory, /dev/shm (0.000 GB free), through which the 2" in str(
        ended.value
    )
    assert f"this run writes to --save {checkpoints}" not in str(ended.value)


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))  # 64 GB, half of it CUDA's libraries


def test_out_of_memory_comes_with_the_plan():
    flags = tiny_gpt(hidden_size=512, ultramem_spans="1:2", ultramem_num_keys=23_000)
    with pytest.raises(RanksFailed, match="can't allocate memory") as ended:
        run_pretrain(1, flags, before=_limit_memory)
    assert "rank 0 ran out of memory. The estimate of ultramem plan" in str(ended.value)
    assert "GB per rank" in str(ended.value)
