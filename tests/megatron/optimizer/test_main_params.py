"""--ultramem-table-main-params none: tables in bfloat16 that have no float32 copy."""

from argparse import Namespace

import pytest
import torch

from tests.closeness import assert_close
from tests.megatron.optimizer.host_runs import HALF, flags
from tests.training_runs import run_pretrain
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.flags.row_adam_flags import refuse_row_adam
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.spans import Span

_NONE = {"ultramem_table_main_params": "none"}
_DEVICE = {"ultramem_row_adam": True}
_HOST = {"ultramem_table_memory": "host"}
_NUMBER = {"ultramem_partition": "number"}
_COLUMNS = {"ultramem_partition": "dimension"}
_WHOLE = {"ultramem_parallel_size": 1}
_INT8 = {"ultramem_table_moments": "int8"}
_DISTRIBUTED = {"use_distributed_optimizer": True}
_RESHARDABLE = {**_DISTRIBUTED, "dist_ckpt_optim_fully_reshardable": True}
_LONG = pytest.mark.long
_ROUNDED = 2**-5
"""Four levels of bfloat16, which four steps may be off by."""


def _flags(**changes):
    return flags(**{"bf16": True, **changes})


def _held(run):
    """Of each table: the weights; bytes of what AdamW trains, beyond them."""
    from ultramem_megatron.kernels.reading import UPKEEP, about_to_read_all
    from ultramem_megatron.memory.tables.value_table import value_tables

    found = {}
    for chunk in run.model:
        for name, table in value_tables(chunk).items():
            about_to_read_all(table.weight)
            keeper = getattr(table.weight, UPKEEP)
            trained = keeper.master if table.rows is not None else keeper.part
            same = trained.data_ptr() == table.weight.data_ptr()
            found[name] = table.weight.detach().clone(), 0 if same else trained.nbytes
    return found


def _trained(world_size, given):
    return run_pretrain(world_size, given, parameters=True, on_finish=_held)


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        pytest.param(1, _DEVICE, id="one rank"),
        pytest.param(1, _HOST, id="host", marks=_LONG),
        pytest.param(1, {**_DEVICE, **_INT8}, id="int8", marks=_LONG),
        pytest.param(2, {**_DEVICE, **_NUMBER}, id="number", marks=_LONG),
        pytest.param(2, {**_DEVICE, **_COLUMNS, **_INT8}, id="dimension, int8", marks=_LONG),
        pytest.param(2, {**_DEVICE, **_WHOLE}, id="replicas", marks=_LONG),
        pytest.param(2, {**_DEVICE, **_DISTRIBUTED, **_NUMBER}, id="distributed", marks=_LONG),
        pytest.param(2, {**_HOST, **_DISTRIBUTED, **_COLUMNS}, id="host, distributed", marks=_LONG),
        pytest.param(
            2, {**_DEVICE, "pipeline_model_parallel_size": 2, "num_layers": 4}, id="PP", marks=_LONG
        ),
    ],
)
def test_training_is_near_that_with_a_copy(world_size, changes):
    ours, copied = (_trained(world_size, _flags(**changes, **more)) for more in (_NONE, {}))
    for name in ("losses", "grad_norms"):
        assert getattr(ours, name) == pytest.approx(getattr(copied, name), rel=2 * HALF)
    moved = 0
    for mine, theirs in zip(ours.ranks, copied.ranks, strict=True):
        for name, (table, more) in theirs.finished.items():
            assert more == 2 * table.nbytes
            found, nothing = mine.finished[name]
            assert nothing == 0
            assert_close(found, table, _ROUNDED, name)
            moved += int((found != table).sum())
    assert moved  # it is rounded otherwise
    if "ultramem_parallel_size" in changes:
        first, second = (rank.finished for rank in ours.ranks)
        assert all(torch.equal(first[name][0], second[name][0]) for name in first)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param((1, _DEVICE), (1, _DEVICE), id="one rank"),
        pytest.param((1, _HOST), (1, _HOST), id="host", marks=_LONG),
        pytest.param((1, {**_HOST, **_INT8}), (1, {**_HOST, **_INT8}), id="int8", marks=_LONG),
        pytest.param((1, _DEVICE), (1, _HOST), id="to the host", marks=_LONG),
        pytest.param(
            (2, {**_DEVICE, **_NUMBER}), (2, {**_DEVICE, **_COLUMNS}), id="to columns", marks=_LONG
        ),
        pytest.param(
            (2, {**_DEVICE, **_DISTRIBUTED, **_NUMBER}),
            (2, {**_DEVICE, **_DISTRIBUTED, **_NUMBER}),
            id="distributed",
            marks=_LONG,
        ),
        pytest.param(
            (2, {**_DEVICE, **_RESHARDABLE, **_NUMBER}),
            (1, {**_DEVICE, **_RESHARDABLE}),
            id="distributed, to one rank",
            marks=_LONG,
        ),
        pytest.param(
            (2, {**_HOST, **_DISTRIBUTED, **_COLUMNS}),
            (2, {**_HOST, **_DISTRIBUTED, **_COLUMNS}),
            id="host, distributed",
            marks=_LONG,
        ),
    ],
)
def test_a_run_goes_on_from_its_checkpoint(before, after, tmp_path):
    """To the bit in its own layout, beside one that also saves: that brings all rows up to date."""
    runs = []
    for folder, stops in (("whole", {}), ("part", {"exit_interval": 2})):
        saved = {"save": tmp_path / folder, "save_interval": 2, "ckpt_format": "torch_dist"}
        runs.append(_trained(before[0], _flags(**{**_NONE, **saved, **before[1], **stops})))
    loads = {"load": tmp_path / "part", "ckpt_format": "torch_dist"}
    resumed = _trained(after[0], _flags(**{**_NONE, **loads, **after[1]}))
    whole, _ = runs
    near = 0 if before == after else HALF
    assert resumed.losses == pytest.approx(whole.losses[2:], rel=near, abs=0)
    if near:
        return
    for mine, theirs in zip(resumed.ranks, whole.ranks, strict=True):
        for name, (table, _) in theirs.finished.items():
            assert torch.equal(mine.finished[name][0], table), name


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(_NONE, {}, id="to a copy", marks=_LONG),
        pytest.param({}, _NONE, id="from a copy", marks=_LONG),
    ],
)
def test_a_run_may_change_at_a_checkpoint(first, second, tmp_path):
    saved = {"save": tmp_path, "load": tmp_path, "save_interval": 2, "load_or_start": True}
    saved |= {"ckpt_format": "torch_dist", **_DEVICE}
    run_pretrain(1, _flags(**saved, **first, exit_interval=2))
    ours = run_pretrain(1, _flags(**saved, **second, **({} if second else _COPY))).losses
    same = run_pretrain(1, _flags(**_DEVICE, **first)).losses[2:]
    assert ours == pytest.approx(same, rel=HALF)


_COPY = {"ultramem_table_main_params": "float32"}


@pytest.mark.parametrize(
    ("given", "changes", "message"),
    [
        ({"bf16": False}, {}, "none is for tables in bfloat16, and needs --bf16"),
        ({}, {"row_adam": False}, "main-params none needs --ultramem-row-adam or"),
        ({"use_torch_fsdp2": True}, {}, "none cannot be combined with --use-torch-fsdp2"),
    ],
)
def test_where_it_cannot_be_it_is_refused(given, changes, message):
    sizes = {"spans": (Span(1, 2),), "num_keys": 4, "key_dim": 4, "value_dim": 4}
    sizes |= {"row_adam": True, "table_main_params": "none"}
    args = {"optimizer": "adam", "bf16": True}
    refuse_row_adam(Namespace(**args), UltraMemConfig(**sizes))
    with pytest.raises(UltraMemError, match=message):
        refuse_row_adam(Namespace(**{**args, **given}), UltraMemConfig(**{**sizes, **changes}))
