"""--ultramem-table-moments with --ultramem-table-memory host: as on the device."""

import pytest

from tests.closeness import assert_close
from tests.megatron.optimizer.host_runs import (
    ROUNDING,
    SKIPPING,
    assert_trained_alike,
    flags,
    tables,
    trained,
)
from tests.training_runs import run_pretrain

_HOST = {"ultramem_table_memory": "host"}
_DEVICE = {"ultramem_row_adam": True}
_COLUMNS = {"ultramem_partition": "dimension"}
_NUMBER = {"ultramem_partition": "number"}
_WHOLE = {"ultramem_parallel_size": 1}
_DISTRIBUTED = {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": True}
_LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {}),
        pytest.param(2, _NUMBER, id="number", marks=_LONG),
        pytest.param(2, _COLUMNS, id="dimension", marks=_LONG),
        pytest.param(
            4,
            {"ultramem_partition": "grid", "ultramem_node_size": 2, "global_batch_size": 4},
            id="grid",
            marks=_LONG,
        ),
        pytest.param(2, {**_WHOLE, "global_batch_size": 4}, id="replicas", marks=_LONG),
        pytest.param(2, {"use_distributed_optimizer": True, **_COLUMNS}, id="DO", marks=_LONG),
        pytest.param(1, {"bf16": True}, id="bf16", marks=_LONG),
        pytest.param(2, {**SKIPPING, **_COLUMNS}, id="fp16, skipped steps", marks=_LONG),
    ],
)
def test_training_is_the_device_s(world_size, changes):
    """Of one second moment a row; codes of 1/127 would show what rounding moves them by."""
    given = {**changes, "ultramem_table_moments": "factored"}
    device = {**given, **_DEVICE, "use_distributed_optimizer": False}
    ours, device = (trained(world_size, flags(**each)) for each in ({**given, **_HOST}, device))
    assert_trained_alike(ours, device, changes)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param((1, _HOST), (1, _HOST), id="on the host"),
        pytest.param((1, _HOST), (1, _DEVICE), id="to the device", marks=_LONG),
        pytest.param((1, _DEVICE), (1, _HOST), id="to the host", marks=_LONG),
        pytest.param(
            (2, {**_HOST, **_COLUMNS}), (2, {**_HOST, **_NUMBER}), id="to rows", marks=_LONG
        ),
        pytest.param(
            (2, {**_HOST, **_NUMBER}), (2, {**_HOST, **_COLUMNS}), id="to columns", marks=_LONG
        ),
        pytest.param(
            (2, {**_HOST, **_COLUMNS, "use_distributed_optimizer": True}),
            (2, {**_HOST, **_COLUMNS, "use_distributed_optimizer": True}),
            id="distributed, default format",
            marks=_LONG,
        ),
        pytest.param(
            (2, {**_HOST, **_COLUMNS, **_DISTRIBUTED}),
            (1, {**_HOST, **_DISTRIBUTED}),
            id="distributed, to one rank",
            marks=_LONG,
        ),
    ],
)
@pytest.mark.parametrize("kind", [pytest.param("factored", marks=_LONG), "int8"])
def test_a_run_goes_on_from_its_checkpoint(before, after, kind, tmp_path):
    common = {"ultramem_table_moments": kind}
    saved = {"save": tmp_path, "load": tmp_path, "save_interval": 2, "load_or_start": True}
    saved |= {"ckpt_format": "torch_dist", **common}
    run_pretrain(before[0], flags(**{**saved, **before[1]}, exit_interval=2))
    resumed = trained(after[0], flags(**{**saved, **after[1]}))
    whole = run_pretrain(1, flags(**common, **_HOST), parameters=True, on_finish=tables)
    for name in ("losses", "grad_norms"):
        assert getattr(resumed, name) == pytest.approx(getattr(whole, name)[2:], rel=ROUNDING)
    for rank in resumed.ranks:
        for name, parameter in rank.parameters.items():
            if parameter.shape == whole.ranks[0].parameters[name].shape:
                assert_close(parameter, whole.ranks[0].parameters[name], ROUNDING, name)
