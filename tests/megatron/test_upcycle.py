"""Memory layers added to a trained dense GPT, and training of the memories alone."""

import pytest
import torch

from tests.ranks import RanksFailed
from tests.training_runs import run_pretrain, tiny_gpt
from tests.whole_model import AFTER_STEPS, LOSS

_MODEL = {"num_layers": 4, "ckpt_format": "torch_dist", "disable_bias_linear": True}
_MEMORY = {"ultramem_spans": "1:2/3:4", "ultramem_num_keys": 12, "ultramem_topk": 6}
_STILL = {"lr": 0.0, "min_lr": 0.0}
_NO_PROJECTION = {
    "ultramem_value_projection": None,
    "no_ultramem_value_projection": True,
    "ultramem_value_dim": 32,
    "ultramem_value_expansion": 1,
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Folder of a dense GPT after two steps."""
    folder = tmp_path_factory.mktemp("dense")
    run_pretrain(1, tiny_gpt(**_MODEL, train_iters=2, lr=1e-2, save=folder, save_interval=2))
    return folder


@pytest.fixture(scope="module")
def dense_losses(dense):
    """The losses that it has from there without learning."""
    return run_pretrain(
        1, tiny_gpt(**_MODEL, **_STILL, load=dense, finetune=True, train_iters=2)
    ).losses


def _upcycled(dense, **changes):
    return tiny_gpt(**{**_MODEL, **_MEMORY, "ultramem_upcycle": dense, "train_iters": 2, **changes})


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {}),
        (1, _NO_PROJECTION),
        (2, {"use_distributed_optimizer": True}),
        (2, {"tensor_model_parallel_size": 2}),
        (2, {"pipeline_model_parallel_size": 2}),
    ],
)
def test_without_learning_the_loss_is_the_dense_models(world_size, changes, dense, dense_losses):
    run = run_pretrain(world_size, _upcycled(dense, **_STILL, **changes))
    assert run.losses == pytest.approx(dense_losses, rel=LOSS)


@pytest.mark.parametrize("layout", [{}, _NO_PROJECTION])
def test_memories_learn_from_their_silent_start(layout, dense, dense_losses):
    run = run_pretrain(
        1, _upcycled(dense, train_iters=3, **layout), initial_parameters=True, parameters=True
    )
    assert run.losses[0] == pytest.approx(dense_losses[0], rel=LOSS)
    assert abs(run.losses[1] - dense_losses[1]) > 2 * LOSS * dense_losses[1]
    (rank,) = run.ranks
    for name, before in rank.initial_parameters.items():
        if ".memory." in name:
            assert not torch.equal(rank.parameters[name], before), name


@pytest.fixture(scope="module")
def alone(dense):
    """Losses of one rank that trains the memories alone."""
    flags = _upcycled(dense, ultramem_train_only="memory", train_iters=3)
    return run_pretrain(1, flags).losses


_RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {}),
        (1, _RECOMPUTE),
        (2, {"use_distributed_optimizer": True, "overlap_grad_reduce": True}),
        (2, {"pipeline_model_parallel_size": 2}),
    ],
)
def test_training_memories_alone_leaves_the_rest_bitwise(world_size, changes, dense, alone):
    run = run_pretrain(
        world_size,
        _upcycled(dense, ultramem_train_only="memory", train_iters=3, **changes),
        initial_parameters=True,
        parameters=True,
    )
    for rank in run.ranks:
        names = [name for name in rank.initial_parameters if ".memory." in name]
        assert names
        for name, before in rank.initial_parameters.items():
            assert torch.equal(rank.parameters[name], before) == (".memory." not in name), name
    assert run.losses[0] == pytest.approx(alone[0], rel=LOSS)
    assert run.losses == pytest.approx(alone, rel=AFTER_STEPS)


@pytest.mark.parametrize("train_only", [{}, {"ultramem_train_only": "memory"}])
def test_an_upcycled_run_resumes_from_its_own_checkpoint(train_only, dense, tmp_path):
    flags = {
        "train_iters": 4,
        "save": tmp_path,
        "load": tmp_path,
        "save_interval": 2,
        "load_or_start": True,
        **train_only,
    }
    whole = run_pretrain(1, _upcycled(dense, **flags))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = run_pretrain(1, _upcycled(dense, **flags))
    assert len(whole.losses) == 4
    assert resumed.losses == whole.losses[2:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "hidden_size is 64 here, 32 in the checkpoint"),
        ({"num_layers": 5}, "num_layers is 5 here, 4 in the checkpoint"),
        ({"swiglu": True}, "swiglu is True here, False in the checkpoint"),
        (
            {"ultramem_spans": "2:2", "ultramem_replace_mlp": True},
            "without its MLPs is another model",
        ),
        ({"ultramem_upcycle": "/nowhere"}, "--ultramem-upcycle /nowhere: no checkpoint there"),
        (
            {"ultramem_spans": None},
            "--ultramem-num-keys, --ultramem-topk, --ultramem-upcycle given, but no memory layer "
            "is placed",
        ),
    ],
)
def test_a_dense_model_that_does_not_fit_is_refused(changes, message, dense):
    with pytest.raises(RanksFailed) as failed:
        run_pretrain(1, _upcycled(dense, **changes))
    assert message in str(failed.value)


def test_a_checkpoint_with_memories_is_not_upcycled(dense, tmp_path):
    run_pretrain(1, _upcycled(dense, train_iters=1, save=tmp_path, save_interval=1))
    with pytest.raises(RanksFailed, match="has memory layers already"):
        run_pretrain(1, _upcycled(tmp_path))
