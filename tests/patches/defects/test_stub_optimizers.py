"""A run that trains value tables alone saves, which it cannot upstream."""

import pytest
import torch

from tests.ranks import RanksFailed
from tests.training_runs import run_pretrain, tiny_gpt
from ultramem_megatron.megatron.background_reads import BackgroundReads, TableReads
from ultramem_megatron.patches.registry import PATCH_MODULES

_NAME = "defects.stub_optimizers"


@pytest.mark.long
@pytest.mark.parametrize("patched", [True, False])
def test_a_run_of_tables_alone_saves(patched, tmp_path):
    zeros = torch.zeros(144, dtype=torch.int64)
    BackgroundReads(1, {1: TableReads(zeros, zeros)}).write(tmp_path / "reads.npz")
    flags = tiny_gpt(
        ultramem_spans="1:2",
        ultramem_num_keys=12,
        ultramem_topk=6,
        ultramem_train_only="memory",
        ultramem_train_rows=5,
        ultramem_background_reads=tmp_path / "reads.npz",
        save=tmp_path / "saved",
        save_interval=3,
    )
    if patched:
        run_pretrain(1, flags)
        assert (tmp_path / "saved" / "iter_0000003").is_dir()
        return
    with pytest.raises(RanksFailed, match="'NoneType' object has no attribute 'param_groups'"):
        run_pretrain(1, flags, patches=[name for name in PATCH_MODULES if name != _NAME])
