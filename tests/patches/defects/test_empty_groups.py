"""A pipeline stage without a memory goes on in half precision, which it does not upstream."""

import pytest

from tests.ranks import RanksFailed
from tests.training_runs import run_pretrain, tiny_gpt
from ultramem_megatron.patches.registry import PATCH_MODULES

_NAME = "defects.empty_groups"


def _run(patches=None, **changes):
    flags = tiny_gpt(
        ultramem_spans="1:2",
        ultramem_num_keys=12,
        ultramem_topk=6,
        pipeline_model_parallel_size=2,
        pipeline_model_parallel_layout="Et|tL",
        bf16=True,
        ckpt_format="torch_dist",
        train_iters=4,
        **changes,
    )
    return run_pretrain(2, flags, patches=patches)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return folder, _run(save=folder, save_interval=2).losses


def test_it_goes_on_with_the_same_losses(saved):
    folder, losses = saved
    assert _run(load=folder, ckpt_step=2).losses == losses[2:]


@pytest.mark.long
def test_it_cannot_be_loaded_upstream(saved):
    with pytest.raises(RanksFailed, match="KeyError: 'fp32_from_fp16'"):
        _run(load=saved[0], ckpt_step=2, patches=[name for name in PATCH_MODULES if name != _NAME])
