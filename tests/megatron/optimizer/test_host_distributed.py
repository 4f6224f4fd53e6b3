"""--ultramem-table-memory host with the distributed optimizer: as without it, on the device."""

import pytest

from tests.closeness import assert_close
from tests.megatron.optimizer.host_runs import (
    HALF,
    ROUNDING,
    SKIPPING,
    assert_trained_alike,
    flags,
    trained,
)
from tests.training_runs import run_pretrain

_DISTRIBUTED = {"ultramem_table_memory": "host", "use_distributed_optimizer": True}
_RESHARDABLE = {**_DISTRIBUTED, "dist_ckpt_optim_fully_reshardable": True}
_WHOLE = {"ultramem_parallel_size": 1}
_LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        pytest.param(2, {"ultramem_partition": "number"}, id="number", marks=_LONG),
        pytest.param(2, {"ultramem_partition": "dimension"}, id="dimension", marks=_LONG),
        pytest.param(
            4,
            {"ultramem_partition": "grid", "ultramem_node_size": 2, "global_batch_size": 4},
            id="grid",
            marks=_LONG,
        ),
        pytest.param(2, {**_WHOLE, "global_batch_size": 4}, id="replicas"),
        pytest.param(
            4,
            {"ultramem_parallel_size": 2, "global_batch_size": 4},
            id="replicas of parts",
            marks=_LONG,
        ),
        pytest.param(
            4,
            {"tensor_model_parallel_size": 2, "sequence_parallel": True, **_WHOLE},
            id="TP, sequence parallel",
            marks=_LONG,
        ),
        pytest.param(
            4, {"pipeline_model_parallel_size": 2, "num_layers": 4, **_WHOLE}, id="PP", marks=_LONG
        ),
        pytest.param(2, {"context_parallel_size": 2}, id="CP", marks=_LONG),
        pytest.param(
            2,
            {"ultramem_values": "prevalued", "ultramem_value_expansion": 1, **_WHOLE},
            id="pre-values",
            marks=_LONG,
        ),
        pytest.param(
            2,
            {**_WHOLE, "overlap_grad_reduce": True, "overlap_param_gather": True},
            id="overlaps",
            marks=_LONG,
        ),
        pytest.param(
            2, {**_WHOLE, "calculate_per_token_loss": True}, id="per-token loss", marks=_LONG
        ),
        pytest.param(2, {**_WHOLE, "ultramem_value_lr_fixed": 1e-3}, id="fixed rate", marks=_LONG),
        pytest.param(2, {"bf16": True, **_WHOLE}, id="bf16", marks=_LONG),
        pytest.param(2, {**SKIPPING, **_WHOLE}, id="fp16, skipped steps", marks=_LONG),
    ],
)
def test_training_is_that_without_it_on_the_device(world_size, changes):
    plain = {**changes, "use_distributed_optimizer": False, "overlap_param_gather": False}
    ours, device = (
        trained(world_size, flags(**each)) for each in ({**changes, **_DISTRIBUTED}, plain)
    )
    assert_trained_alike(ours, device, changes)


@pytest.mark.parametrize("changes", [{}, pytest.param({"bf16": True}, marks=_LONG)])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param((2, _DISTRIBUTED), (2, _DISTRIBUTED), id="default format"),
        pytest.param((2, _RESHARDABLE), (1, _RESHARDABLE), id="to one rank", marks=_LONG),
        pytest.param(
            (2, {**_RESHARDABLE, "ultramem_parallel_size": 2}),
            (2, {**_RESHARDABLE, **_WHOLE}),
            id="to another cut",
            marks=_LONG,
        ),
        pytest.param(
            (2, _RESHARDABLE),
            (2, {**_RESHARDABLE, "ultramem_table_memory": "device"}),
            id="to the device",
            marks=_LONG,
        ),
        pytest.param(
            (2, {**_RESHARDABLE, "ultramem_table_memory": "device"}),
            (2, _RESHARDABLE),
            id="to the host",
            marks=_LONG,
        ),
    ],
)
def test_a_run_goes_on_from_its_checkpoint(before, after, changes, tmp_path):
    saved = {"save": tmp_path, "load": tmp_path, "save_interval": 2, "load_or_start": True}
    saved |= {"ckpt_format": "torch_dist", "global_batch_size": 2, **changes}
    run_pretrain(before[0], flags(**{**_WHOLE, **saved, **before[1]}, exit_interval=2))
    continued = flags(**{**_WHOLE, **saved, **after[1]})
    resumed = run_pretrain(after[0], continued, parameters=True)
    whole = run_pretrain(1, flags(**{**changes, "global_batch_size": 2}), parameters=True)
    tolerance = HALF if "bf16" in changes else ROUNDING
    assert len(resumed.losses) == 2
    for mine, theirs in zip(resumed.losses, whole.losses[2:], strict=True):
        assert abs(mine - theirs) <= tolerance * abs(theirs)
    for mine, theirs in zip(resumed.grad_norms, whole.grad_norms[2:], strict=True):
        assert abs(mine - theirs) <= tolerance * abs(theirs)
    if "bf16" in changes:  # Adam moves what is near zero by the sign of a rounded gradient
        return
    for rank in resumed.ranks:
        for name, parameter in whole.ranks[0].parameters.items():
            assert_close(rank.parameters[name], parameter, ROUNDING, name)
