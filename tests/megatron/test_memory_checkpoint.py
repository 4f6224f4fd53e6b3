"""Checkpoints: exact resumption, other layouts, refusal of other designs and damaged tables."""

import functools
import shutil

import pytest
import torch

from tests.ranks import RanksFailed, run_on_ranks
from tests.training_runs import run_pretrain, tiny_gpt
from tests.whole_model import LOSS

_MEMORY = {
    "num_layers": 4,
    "ultramem_spans": "1:2/3:4",
    "ultramem_num_keys": 12,
    "ultramem_topk": 6,
    "ultramem_query_conv_kernel": 3,
    "ckpt_format": "torch_dist",
    "train_iters": 6,
    "hidden_dropout": 0.1,
}


def _flags(**changes):
    return tiny_gpt(**{**_MEMORY, **changes})


def _buffers(trained):
    return {n: b.clone() for chunk in trained.model for n, b in chunk.named_buffers()}


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {}),
        (
            2,
            {
                "use_distributed_optimizer": True,
                "overlap_grad_reduce": True,
                "overlap_param_gather": True,
                "bf16": True,
            },
        ),
        (2, {"fp16": True, "initial_loss_scale": 4096}),
    ],
)
def test_resumed_training_continues_exactly(world_size, changes, tmp_path):
    whole = run_pretrain(
        world_size,
        _flags(**changes, save=tmp_path, save_interval=3),
        parameters=True,
        on_finish=_buffers,
    )
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    resumed = run_pretrain(
        world_size, _flags(**changes, load=tmp_path), parameters=True, on_finish=_buffers
    )
    assert len(resumed.losses) == 3
    assert resumed.losses == whole.losses[3:]
    assert resumed.grad_norms == whole.grad_norms[3:]
    for rank, expected in zip(resumed.ranks, whole.ranks, strict=True):
        for name, parameter in expected.parameters.items():
            assert torch.equal(rank.parameters[name], parameter), name
        assert any(name.endswith("cores.u") for name in expected.finished)
        for name, buffer in expected.finished.items():
            assert torch.equal(rank.finished[name], buffer), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run without dropout (its random streams depend on the layout), saved after step 3."""
    folder = tmp_path_factory.mktemp("saved")
    run = run_pretrain(1, _flags(save=folder, save_interval=3, hidden_dropout=0))
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    return folder, run


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, {"tensor_model_parallel_size": 2}),
        (2, {"pipeline_model_parallel_size": 2}),
        (2, {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Ett|ttL"}),
        (2, {}),
    ],
)
def test_a_checkpoint_continues_in_another_layout(world_size, layout, saved):
    folder, whole = saved
    run = run_pretrain(
        world_size, _flags(load=folder, hidden_dropout=0, no_load_rng=True, **layout)
    )
    assert run.losses == pytest.approx(whole.losses[3:], rel=LOSS)
    assert run.grad_norms == pytest.approx(whole.grad_norms[3:], rel=10 * LOSS)


def _refusal(**changes):
    with pytest.raises(RanksFailed) as failed:
        run_pretrain(1, _flags(**changes))
    return str(failed.value)


def test_a_checkpoint_of_another_design_is_refused(saved):
    folder, _ = saved
    message = _refusal(load=folder, ultramem_num_keys=14, ultramem_cores=1)
    assert "made with another memory design" in message
    assert "--ultramem-num-keys is 14 here, 12 in the checkpoint" in message
    assert "--ultramem-cores is 1 here, 2 in the checkpoint" in message


def test_a_step_without_a_tracker_is_compared_too(saved, tmp_path):
    folder, _ = saved
    shutil.copytree(folder / "iter_0000003", tmp_path / "iter_0000003")
    message = _refusal(load=tmp_path, ckpt_step=3, ultramem_num_keys=14)
    assert "--ultramem-num-keys is 14 here, 12 in the checkpoint" in message


def test_a_step_that_is_not_there_is_refused_before_megatron_looks(saved):
    folder, _ = saved
    message = _refusal(load=folder, ckpt_step=7)
    assert "UltraMemError: --load" in message
    assert "iter_0000007 is not there; found: iter_0000003" in message


def test_a_checkpoint_with_memory_is_refused_by_a_plain_gpt(saved):
    folder, _ = saved
    plain = tiny_gpt(num_layers=4, ckpt_format="torch_dist", load=folder)
    with pytest.raises(RanksFailed, match="the checkpoint has memory layers, this run asks for no"):
        run_pretrain(1, plain)


@pytest.mark.parametrize("flag", ["load", "pretrained_checkpoint"])
def test_flags_that_make_another_model_of_the_weights_are_refused(flag, saved):
    folder, _ = saved
    changed = {"normalization": "RMSNorm", "rotary_base": 500, "openai_gelu": True}
    message = _refusal(**{flag: folder}, **changed)
    assert f"--{flag.replace('_', '-')} {folder}: the checkpoint is of another model" in message
    assert "normalization is RMSNorm here, LayerNorm in the checkpoint" in message
    assert "rotary_base is 500 here, 10000 in the checkpoint" in message
    assert "openai_gelu is True here, False in the checkpoint" in message


def test_compared_flags_exist_and_are_stored():
    assert run_on_ranks(1, _unknown_flags)[0] == set()


def _unknown_flags():
    from ultramem_megatron.megatron.checkpoint.design import _POSITIONS, SAME_FLAGS
    from ultramem_megatron.megatron.checkpoint.stored_flags import taken_flags
    from ultramem_megatron.megatron.flags.parse import parse_words

    compared = {*SAME_FLAGS, *_POSITIONS}
    return (compared - taken_flags()) | (compared - vars(parse_words([])).keys())


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    plain = tiny_gpt(
        num_layers=4, ckpt_format="torch", train_iters=1, save=tmp_path, save_interval=1
    )
    run_pretrain(1, plain)
    assert f"--load {tmp_path} is no torch_dist checkpoint" in _refusal(load=tmp_path)


def _poison(which, trained):
    from ultramem_megatron.memory.layer import memory_layers

    model = trained.model[0]
    layer = next(iter(memory_layers(model)))
    weights = {
        "table": layer.values.weight,
        "keys": layer.retrieval.keys.weight,
        "dense": dict(model.named_parameters())["module.decoder.final_layernorm.weight"],
    }
    weights[which].data.view(-1)[5] = float("nan")
    from megatron.training.checkpointing import save_checkpoint

    save_checkpoint(99, trained.model, None, None, 0)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("table", "values.weight of memory layer 1 holds NaN or infinity in 1 of its 144 rows"),
        ("keys", "weight of memory layer 1 holds NaN or infinity in 1 of its"),
        ("dense", "final_layernorm.weight of the model holds NaN or infinity in 1 of its 32 num"),
    ],
)
def test_nan_in_a_loaded_weight_is_refused(which, message, tmp_path):
    run_pretrain(
        1,
        _flags(save=tmp_path, save_interval=100, train_iters=1, no_save_optim=True),
        on_finish=functools.partial(_poison, which),
    )
    refusal = _refusal(load=tmp_path, no_load_optim=True, finetune=True)
    assert message in refusal
    assert f"--load {tmp_path}/iter_0000099: The loaded" in refusal


def test_a_checkpoint_without_memory_is_refused(tmp_path):
    plain = {"num_layers": 4, "ckpt_format": "torch_dist", "train_iters": 1}
    run_pretrain(1, tiny_gpt(**plain, save=tmp_path, save_interval=1))
    assert "the checkpoint has no memory layers, this run asks for them" in _refusal(load=tmp_path)
