"""Which iteration a --load names, and what is said where it names none."""

from pathlib import Path

import pytest

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.faults.integrity import RELEASE, TRACKER
from ultramem_megatron.megatron.checkpoint.folder import (
    NoCheckpointError,
    checkpoint_folder,
    loaded_iteration,
)


def _saved(checkpoints: Path, tracker: str | None, *folders: str) -> str:
    for name in folders:
        (checkpoints / name).mkdir()
    if tracker is not None:
        (checkpoints / TRACKER).write_text(tracker)
    return str(checkpoints)


@pytest.mark.parametrize(
    ("tracker", "step", "name"),
    [
        ("12\n", None, "iter_0000012"),
        ("12", 3, "iter_0000003"),
        (None, 3, "iter_0000003"),
        (RELEASE, None, "release"),
    ],
)
def test_the_tracker_names_the_iteration_unless_a_step_is_given(tracker, step, name, tmp_path):
    load = _saved(tmp_path, tracker, "iter_0000003", "iter_0000012", "release")
    assert loaded_iteration(load, step) == tmp_path / name


@pytest.mark.parametrize("folders", [(), ("iter_0000003",)])
def test_a_folder_without_tracker_has_no_checkpoint(folders, tmp_path):
    with pytest.raises(NoCheckpointError, match=f"{tmp_path}: no checkpoint there"):
        loaded_iteration(_saved(tmp_path, None, *folders))


@pytest.mark.parametrize(
    ("tracker", "step", "message"),
    [
        ("3", 7, "iter_0000007 is not there; found: iter_0000003. Choose one with --ckpt-step"),
        ("7", None, "iter_0000007 is not there; found: iter_0000003"),
        ("3:half", None, "says '3:half', which is no iteration; found: iter_0000003"),
    ],
)
def test_a_wrong_iteration_is_not_taken_for_a_fresh_start(tracker, step, message, tmp_path):
    with pytest.raises(UltraMemError, match=message) as refused:
        loaded_iteration(_saved(tmp_path, tracker, "iter_0000003"), step)
    assert not isinstance(refused.value, NoCheckpointError)


def test_another_format_is_there_but_cannot_be_read(tmp_path):
    load = _saved(tmp_path, "3", "iter_0000003")
    (tmp_path / "iter_0000003" / "mp_rank_00").mkdir()
    with pytest.raises(UltraMemError, match="iter_0000003 is not a torch_dist checkpoint"):
        checkpoint_folder(load)
