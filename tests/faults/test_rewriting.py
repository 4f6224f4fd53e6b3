"""A complete iteration is whole at every moment while a later run writes it again."""

import functools
import shutil

import pytest

from tests.faults.test_killed_saves import killed_before, operations_of
from tests.ranks import RanksFailed, run_on_ranks
from tests.training_runs import IN_BACKGROUND, run_pretrain, tiny_gpt
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.faults import integrity
from ultramem_megatron.faults.rewriting import beside
from ultramem_megatron.faults.run_lock import only_run

_AGAIN = "iter_0000003"


def _flags(folder, **changes):
    """Three steps: the last is saved because training ends there, also when it only starts."""
    return tiny_gpt(
        ultramem_spans="1:2",
        ultramem_num_keys=12,
        ultramem_topk=6,
        ckpt_format="torch_dist",
        verify_integrity=True,
        save_interval=2,
        save=folder / "checkpoints",
        load=folder / "checkpoints",
        load_or_start=True,
        **changes,
    )


def _sums(folder):
    return (folder / "checkpoints" / _AGAIN / "integrity.json").read_bytes()


@pytest.fixture
def finished(tmp_path):
    run_pretrain(2, _flags(tmp_path))
    return tmp_path


@pytest.mark.parametrize("background", [{}, IN_BACKGROUND], ids=["synchronous", "asynchronous"])
def test_a_finished_run_that_is_started_again(background, finished):
    before = _sums(finished)
    again = _flags(finished, **background)
    run_pretrain(2, again, before=functools.partial(killed_before, str(finished), _AGAIN, None))
    operations = operations_of(finished)
    assert len(operations) > 9  # it was written again
    in_place = [o for o in operations if f"/{_AGAIN}/" in o]
    assert in_place == []
    assert integrity.newest_whole(finished / "checkpoints") == 3
    assert _sums(finished) != before
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == [
        "iter_0000002",
        _AGAIN,
        integrity.TRACKER,
    ]


def test_what_others_put_beside_iterations_stays(tmp_path):
    """Every folder named replaced_iter_... or rewriting_iter_... once went at the next start."""
    others = ("replaced_iter_0000003", "rewriting_iter_0000003", "ultramem_replaced_iter_old")
    for name in others:
        (tmp_path / name).mkdir()
    away = tmp_path / "away"
    away.mkdir()
    (tmp_path / "ultramem_rewriting_iter_0000003").symlink_to(away)
    (tmp_path / "ultramem_replaced_iter_0000002").mkdir()  # a training's own, killed in between
    refused = pytest.raises(UltraMemError, match="was not made by a training: move it away")
    with only_run(str(tmp_path)), refused:
        beside(tmp_path / _AGAIN)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {*others, "away", "ultramem_rewriting_iter_0000003", "iter_0000002"}


@pytest.mark.long
def test_killed_before_any_operation_of_writing_it_again(finished):
    for kill_at in range(1, 100):
        copy = finished / str(kill_at)
        shutil.copytree(finished / "checkpoints", copy / "checkpoints")
        again, before = _flags(copy), functools.partial(killed_before, str(copy), _AGAIN, kill_at)
        try:
            run_pretrain(2, again, before=before)
        except RanksFailed:
            pass
        else:
            break
        with only_run(str(copy / "checkpoints")):
            integrity.verify.cache_clear()
            assert integrity.newest_whole(copy / "checkpoints") == 3
        assert run_pretrain(2, _flags(copy)).iterations == []  # loaded, nothing left to train
    assert kill_at > 12


def _save_twice(folder):
    import torch
    from megatron.core import dist_checkpointing, parallel_state

    from ultramem_megatron.patches import registry

    registry.apply_all()
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    for written in (1, 2):
        dist_checkpointing.save({"written": written}, folder)
    return dist_checkpointing.load({}, str(folder))["written"]


def test_a_folder_may_be_a_path_too(tmp_path):
    """Upstream's own tests save so; the first save once looked for a folder to swap."""
    (tmp_path / _AGAIN).mkdir()
    assert run_on_ranks(1, _save_twice, tmp_path / _AGAIN) == [2]
    assert [path.name for path in tmp_path.iterdir()] == [_AGAIN]
