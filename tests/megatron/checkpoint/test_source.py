"""Where training takes weights from, and a --load that is not there."""

from argparse import Namespace
from pathlib import Path

import pytest

from tests.ranks import RanksFailed, run_on_ranks
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.faults.integrity import TRACKER
from ultramem_megatron.megatron.checkpoint.source import source_of_weights


def _args(**changes):
    return Namespace(
        **{
            "load": None,
            "save": None,
            "ckpt_step": None,
            "load_or_start": False,
            "verify_integrity": False,
            "ckpt_format": "torch_dist",
            "non_persistent_ckpt_type": None,
            "pretrained_checkpoint": None,
            **changes,
        }
    )


@pytest.fixture
def saved(tmp_path):
    (tmp_path / "run" / "iter_0000003").mkdir(parents=True)
    (tmp_path / "run" / TRACKER).write_text("3")
    return str(tmp_path / "run")


def test_a_checkpoint_under_load_comes_first(saved):
    found = source_of_weights(_args(load=saved, pretrained_checkpoint="/nowhere"))
    assert found.iteration().name == "iter_0000003"
    assert str(found) == f"--load {saved}"
    assert str(source_of_weights(_args(pretrained_checkpoint=saved))) == (
        f"--pretrained-checkpoint {saved}"
    )
    assert source_of_weights(_args()) is None


@pytest.mark.parametrize("changes", [{}, {"save": "typo"}, {"pretrained_checkpoint": "x"}])
def test_a_mistyped_load_is_no_fresh_start(changes):
    with pytest.raises(UltraMemError, match=r"--load typo: no checkpoint there.*--load-or-start"):
        source_of_weights(_args(load="typo", **changes))


def test_a_run_may_start_where_it_saves(saved, tmp_path):
    new = str(tmp_path / "new")
    assert source_of_weights(_args(load=new, save=new, load_or_start=True)) is None
    with pytest.raises(UltraMemError, match=f"would save to {saved}: .* Correct --load"):
        source_of_weights(_args(load=new, save=saved, load_or_start=True))


def test_a_pretrained_checkpoint_that_is_not_there_is_refused():
    with pytest.raises(UltraMemError, match="--pretrained-checkpoint /none: no checkpoint there"):
        source_of_weights(_args(pretrained_checkpoint="/none")).iteration()


def _flags_of(folder):
    from ultramem_megatron.megatron.checkpoint.folder import stored_args

    stored_args(folder)


def _left_out(folder, args):
    from ultramem_megatron.megatron.checkpoint.design import refuse_memories_left_out

    refuse_memories_left_out(folder, args)


def test_flags_that_cannot_be_read_stop_no_plain_model(saved):
    metadata = Path(saved, "iter_0000003", "metadata.json")
    metadata.write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    with pytest.raises(RanksFailed, match="its flags cannot be read"):
        run_on_ranks(1, _flags_of, str(metadata.parent))
    run_on_ranks(1, _left_out, saved, _args())
