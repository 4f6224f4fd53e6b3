"""`--async-save`: training goes on while another process writes what was there when it began."""

import functools
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.ranks import RanksFailed
from tests.training_runs import IN_BACKGROUND, run_pretrain, tiny_gpt

_SLOW = 1.0  # seconds; a step takes hundredths
_FLAGS = {
    "ultramem_spans": "1:2",
    "ultramem_num_keys": 12,
    "ultramem_topk": 6,
    "ckpt_format": "torch_dist",
    "save_interval": 2,
    "train_iters": 5,
}


def _write_slowly(folder: Path) -> None:
    """In the rank: the writer of iteration 2 waits; who writes shards goes into a file."""
    rank = os.getpid()

    def hook(event: str, arguments: tuple) -> None:
        if event != "open" or not str(arguments[0]).endswith(".distcp"):
            return
        if "iter_0000002" in str(arguments[0]):
            time.sleep(_SLOW)
        with open(folder / "writers", "a") as journal:
            journal.write("rank\n" if os.getpid() == rank else "other\n")

    sys.addaudithook(hook)


def _tensors(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    """All of a checkpoint, as it is stored."""
    reader = checkpoint.FileSystemReader(folder / f"iter_{iteration:07}")
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    checkpoint.load(found, storage_reader=reader, no_dist=True)
    return found


def test_training_goes_on_and_what_is_written_is_of_its_iteration(tmp_path, capfd):
    waited, behind = tmp_path / "waited", tmp_path / "behind"
    run_pretrain(1, tiny_gpt(**_FLAGS, save=waited))
    run_pretrain(
        1,
        tiny_gpt(**_FLAGS, save=behind, **IN_BACKGROUND),
        before=functools.partial(_write_slowly, tmp_path),
        print_output=True,
    )
    assert set((tmp_path / "writers").read_text().split()) == {"other"}
    assert "Starting a checkpoint save before previous has finished" in capfd.readouterr().out
    for iteration in (2, 4, 5):  # the last was waited for
        found, wanted = _tensors(behind, iteration), _tensors(waited, iteration)
        assert found.keys() == wanted.keys()
        assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def _kill_the_writer() -> None:
    """In the rank: the process that writes iteration 4 is killed when it begins."""
    rank = os.getpid()

    def hook(event: str, arguments: tuple) -> None:
        file = str(arguments[0]) if event == "open" else ""
        if "iter_0000004" in file and file.endswith(".distcp") and os.getpid() != rank:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_a_writer_that_is_killed_ends_the_run_by_name(tmp_path):
    flags = tiny_gpt(**_FLAGS, save=tmp_path, **IN_BACKGROUND)
    with pytest.raises(RanksFailed, match=r"the process that wrote a checkpoint .* was killed"):
        run_pretrain(1, flags, before=_kill_the_writer)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"
