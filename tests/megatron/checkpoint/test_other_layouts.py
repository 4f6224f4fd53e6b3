"""A distributed optimizer's state, kept as it lay on ranks that are laid out otherwise now."""

import pytest

from tests.ranks import RanksFailed
from tests.training_runs import run_pretrain, tiny_gpt


def _flags(**changes):
    return tiny_gpt(
        **{
            "ultramem_spans": "1:2",
            "ultramem_num_keys": 12,
            "ultramem_topk": 6,
            "ultramem_partition": "dimension",
            "ckpt_format": "torch_dist",
            "use_distributed_optimizer": True,
            "train_iters": 4,
            "save_interval": 2,
            **changes,
        }
    )


def _keep_no_record():
    """Older releases did not write into the flags how tables are cut."""
    from ultramem_megatron.megatron import in_force

    in_force.log_settings = lambda *_: None


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_pretrain(2, _flags(save=folder), before=_keep_no_record).losses


@pytest.mark.parametrize(
    ("ranks", "changes", "message"),
    [
        (
            2,
            {"ultramem_partition": "number"},
            "its tables were over 2 ranks, dimension-wise, here they are over 2 ranks, number-wise",
        ),
        (1, {}, "its tables were over 2 ranks, dimension-wise, here they are whole"),
        (
            2,
            {"tensor_model_parallel_size": 2},
            "--tensor-model-parallel-size was 1, here it is 2, and the state",
        ),
    ],
    ids=["rows for columns", "fewer ranks", "tensor parallel"],
)
def test_it_is_refused_by_name(ranks, changes, message, saved):
    """Rows for columns once loaded in silence, and trained to other losses."""
    with pytest.raises(RanksFailed, match=message):
        run_pretrain(ranks, _flags(load=saved[0], ckpt_step=2, **changes))


def test_the_same_layout_goes_on(saved):
    folder, losses = saved
    assert run_pretrain(2, _flags(load=folder, ckpt_step=2)).losses == losses[2:]


def test_muon_by_blocks_is_refused_on_other_tensor_parallel_ranks(tmp_path):
    """Its steps would be others; losses differed in the fourth digit, in silence."""
    muon = {"optimizer": "muon", "use_distributed_optimizer": None}
    run_pretrain(1, _flags(**muon, save=tmp_path))
    with pytest.raises(RanksFailed, match="with --muon-tp-mode blockwise --optimizer muon takes"):
        run_pretrain(2, _flags(**muon, load=tmp_path, tensor_model_parallel_size=2))


_EXPERTS = {"num_experts": 4, "moe_router_topk": 2, "disable_bias_linear": True}


def test_experts_over_ranks_do_not_follow_experts_on_one(tmp_path):
    """Megatron found two lists of groups that it could not merge."""
    plain = {**_EXPERTS, "use_distributed_optimizer": None}
    losses = run_pretrain(1, _flags(**plain, save=tmp_path)).losses
    spread = {"expert_model_parallel_size": 2}
    with pytest.raises(RanksFailed, match="--expert-model-parallel-size was 1, here it is 2"):
        run_pretrain(2, _flags(**plain, **spread, load=tmp_path, ckpt_step=2))
    weights = _flags(**plain, **spread, load=tmp_path, ckpt_step=2, no_load_optim=True)
    assert run_pretrain(2, weights).losses[0] == pytest.approx(losses[2], abs=1e-4)


def test_what_megatron_finds_no_state_for_is_refused(saved):
    """It ended in a KeyError, and in a list of groups."""
    folder, _ = saved
    without = _flags(use_distributed_optimizer=None, load=folder, ckpt_step=2)
    with pytest.raises(RanksFailed, match="it was saved with --use-distributed-optimizer"):
        run_pretrain(1, without)
    with pytest.raises(RanksFailed, match=r"--lr was 0\.001, here it is 0\.0005"):
        run_pretrain(2, _flags(lr=5e-4, load=folder, ckpt_step=2))


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("save", "cannot load its state from a"),
        ("load", "cannot load an optimizer's state into it"),
    ],
)
def test_sgd_is_refused_where_it_would_be_saved_or_loaded(folder, message, tmp_path):
    flags = _flags(optimizer="sgd", use_distributed_optimizer=None, **{folder: tmp_path})
    with pytest.raises(RanksFailed, match=f"--optimizer sgd: Megatron {message}"):
        run_pretrain(1, flags)
