"""--ultramem-table-moments: the same over layouts, and in checkpoints AdamW's own moments."""

from argparse import Namespace

import pytest

from tests.megatron.optimizer.few_reads import few_reads
from tests.training_runs import run_pretrain
from tests.whole_model import AFTER_STEPS, assert_same_training, train
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.kernels.adam_rows.compact import KINDS
from ultramem_megatron.megatron.flags.row_adam_flags import refuse_row_adam
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.spans import Span

_ROWS = {"ultramem_row_adam": True}
_NUMBER = {"ultramem_partition": "number"}
_COLUMNS = {"ultramem_partition": "dimension"}
_GRID = {"ultramem_partition": "grid", "ultramem_node_size": 2, "global_batch_size": 4}
_WHOLE = {"ultramem_parallel_size": 1}
_DISTRIBUTED = {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": True}
_OF_THE_MODEL = ("ultramem_values", "ultramem_value_expansion", "global_batch_size")
_NEAR = 1e-3
"""Of a loss, after a step with moments of another kind."""
_LONG = pytest.mark.long


def _flags(**changes):
    return few_reads(**{"train_iters": 4, "adam_eps": 1e-5, **_ROWS, **changes})


@pytest.mark.parametrize(
    "kind", [*(pytest.param(k, marks=_LONG) for k in KINDS if k != "int8"), "int8"]
)
@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        pytest.param(2, _NUMBER, id="number", marks=_LONG),
        pytest.param(2, _COLUMNS, id="dimension"),
        pytest.param(4, _GRID, id="grid", marks=_LONG),
        pytest.param(
            4,
            {**_COLUMNS, "ultramem_parallel_size": 2, "global_batch_size": 4},
            id="replicas of columns",
            marks=_LONG,
        ),
        pytest.param(
            2,
            {**_COLUMNS, "ultramem_values": "prevalued", "ultramem_value_expansion": 1},
            id="pre-values, dimension",
            marks=_LONG,
        ),
        pytest.param(2, _WHOLE, id="replicas", marks=_LONG),
        pytest.param(2, {**_DISTRIBUTED, **_COLUMNS}, id="distributed, dimension", marks=_LONG),
        pytest.param(2, {**_DISTRIBUTED, **_NUMBER}, id="distributed", marks=_LONG),
        pytest.param(
            2,
            {"tensor_model_parallel_size": 2, "sequence_parallel": True, **_NUMBER},
            id="TP, sequence parallel",
            marks=_LONG,
        ),
        pytest.param(2, {"context_parallel_size": 2, **_NUMBER}, id="CP", marks=_LONG),
    ],
)
def test_training_is_that_of_one_rank(world_size, changes, kind):
    """Replicas are the same to rounding of their sums, too (`whole`)."""
    moments = {"ultramem_table_moments": kind}
    model = {name: changes[name] for name in _OF_THE_MODEL if name in changes}
    ours, alone = (
        train(*each)
        for each in ((world_size, _flags(**moments, **changes)), (1, _flags(**moments, **model)))
    )
    # A distributed optimizer's ranks have reduced gradients of their own parts alone.
    assert_same_training(ours, alone, gradients="use_distributed_optimizer" not in changes)


@pytest.mark.parametrize("kind", [pytest.param("bfloat16", marks=_LONG), "int8"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param((1, {}), (1, {}), id="one rank"),
        pytest.param((1, {"bf16": True}), (1, {"bf16": True}), id="bf16", marks=_LONG),
        pytest.param((2, _NUMBER), (2, _WHOLE), id="to another cut", marks=_LONG),
        pytest.param((2, _COLUMNS), (2, _COLUMNS), id="columns", marks=_LONG),
        pytest.param((2, _NUMBER), (2, _COLUMNS), id="to columns", marks=_LONG),
        pytest.param((2, _COLUMNS), (1, {}), id="columns, to one rank", marks=_LONG),
        pytest.param(
            (1, {}),
            (2, {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|tL"}),
            id="to stages",
            marks=_LONG,
        ),
        pytest.param(
            (2, {**_DISTRIBUTED, **_NUMBER}),
            (1, _DISTRIBUTED),
            id="distributed, to one rank",
            marks=_LONG,
        ),
    ],
)
def test_a_run_goes_on_from_its_checkpoint(before, after, kind, tmp_path):
    common = {"ultramem_table_moments": kind, "bf16": "bf16" in before[1]}
    saved = {**common, "save": tmp_path, "load": tmp_path, "save_interval": 2}
    saved |= {"ckpt_format": "torch_dist", "load_or_start": True}
    run_pretrain(before[0], _flags(**{**saved, **before[1]}, exit_interval=2))
    resumed = train(after[0], _flags(**{**saved, **after[1]}), gradients_at=3)
    alone = train(1, _flags(**common), gradients_at=3)
    for rank in alone.ranks:
        del rank.iterations[:2]
    assert_same_training(resumed, alone)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param("float32", "int8", id="to int8", marks=_LONG),
        pytest.param("int8", "float32", id="to float32", marks=_LONG),
        pytest.param("int8", "factored", id="to factored", marks=_LONG),
    ],
)
def test_a_run_may_change_how_moments_are_kept(first, second, tmp_path):
    """The first loss afterwards is that of the same weights, and training goes on as it was."""
    saved = {"save": tmp_path, "load": tmp_path, "save_interval": 2, "load_or_start": True}
    saved |= {"ckpt_format": "torch_dist"}
    run_pretrain(1, _flags(ultramem_table_moments=first, **saved, exit_interval=2))
    ours = run_pretrain(1, _flags(ultramem_table_moments=second, **saved)).losses
    same = run_pretrain(1, _flags(ultramem_table_moments=first)).losses[2:]
    assert abs(ours[0] - same[0]) <= AFTER_STEPS * same[0]
    assert abs(ours[1] - same[1]) <= _NEAR * same[1]


@pytest.mark.parametrize(
    ("given", "changes", "message"),
    [
        ({}, {"row_adam": False}, "--ultramem-table-moments int8 needs --ultramem-row-adam or"),
        ({"use_torch_fsdp2": True}, {}, "int8 cannot be combined with --use-torch-fsdp2"),
    ],
)
def test_what_keeps_other_moments_is_refused(given, changes, message):
    sizes = {"spans": (Span(1, 2),), "num_keys": 4, "key_dim": 4, "value_dim": 4}
    refuse_row_adam(
        Namespace(optimizer="adam"), UltraMemConfig(**sizes, row_adam=True, table_moments="int8")
    )
    design = UltraMemConfig(**{**sizes, "row_adam": True, "table_moments": "int8", **changes})
    with pytest.raises(UltraMemError, match=message):
        refuse_row_adam(Namespace(optimizer="adam", **given), design)
