"""Which iteration a --load names, and what is said where it names none."""

from pathlib import Path

import pytest

from ultramem_megatron.errors import UltraMemError, user_error
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
        ("\u0663", None, "which is no iteration; found: iter_0000003"),
        ("9" * 5000, None, "which is no iteration; found: iter_0000003"),
        ("3", 0, "--ckpt-step 0: the first iteration is 1"),
        ("3", -3, "--ckpt-step -3: the first iteration is 1"),
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


def test_a_tracker_that_is_no_text_is_shown(tmp_path):
    load = _saved(tmp_path, "3", "iter_0000003")
    (tmp_path / TRACKER).write_bytes(b"\xff3")
    with pytest.raises(UltraMemError, match=r"says '\\\\xff3', which is no iteration"):
        loaded_iteration(load)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "typo").write_text("")
    with pytest.raises(UltraMemError, match=r"typo: a file\. Give the folder"):
        loaded_iteration(str(tmp_path / "typo"))
    load = _saved(tmp_path, "3")
    (tmp_path / "iter_0000003").write_text("")
    with pytest.raises(UltraMemError, match="iter_0000003 is a file, no folder"):
        loaded_iteration(load)


@pytest.mark.parametrize("content", [b"{", b"null", b"[1]", b"{}", b"\xff"])
def test_a_damaged_metadata_json_is_named(content, tmp_path):
    load = _saved(tmp_path, "3", "iter_0000003")
    (tmp_path / "iter_0000003" / "metadata.json").write_bytes(content)
    with pytest.raises(UltraMemError, match=r"iter_0000003/metadata\.json is damaged"):
        checkpoint_folder(load)


@pytest.mark.parametrize("content", [b'"zarr", "sharded_backend_version": 1', b"1", b'"../x"'])
def test_another_backend_is_no_torch_dist(content, tmp_path):
    load = _saved(tmp_path, "3", "iter_0000003")
    metadata = b'{"sharded_backend": ' + content + b"}"
    (tmp_path / "iter_0000003" / "metadata.json").write_bytes(metadata)
    with pytest.raises(UltraMemError, match="iter_0000003 is not a torch_dist checkpoint"):
        checkpoint_folder(load)


def test_a_path_that_no_file_system_takes_is_one_line():
    with pytest.raises(OSError, match="File name too long") as refused:
        loaded_iteration("x" * 5000)
    assert "xxx: File name too long. Give another path." in str(user_error(refused.value))


def test_another_schedule_is_one_line():
    """A longer run from a shorter one's checkpoint is what a newcomer tries first."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    scheduler = object.__new__(OptimizerParamScheduler)
    scheduler.override_opt_param_scheduler = scheduler.use_checkpoint_opt_param_scheduler = False
    with pytest.raises(AssertionError) as given:
        scheduler._check_and_set(32, 24, "total number of iterations")
    message = str(user_error(given.value))
    assert "schedule has 24 as its total number of iterations, here it is 32" in message
    assert "--override-opt_param-scheduler" in message
    assert user_error(AssertionError("another")) is None
