"""--ultramem-row-adam: training, checkpoints and evaluation are those of AdamW on all rows."""

from argparse import Namespace

import pytest
import torch

from tests.megatron.optimizer.few_reads import few_reads
from tests.whole_model import train
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.flags.row_adam_flags import refuse_row_adam
from ultramem_megatron.megatron.optimizer.row_adam import visit_touched_rows
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.spans import Span
from ultramem_megatron.memory.tables.value_table import ValueTable

_ROWS = {"ultramem_row_adam": True}
_WHOLE = {"ultramem_parallel_size": 1}


def _flags(**changes):
    return few_reads(**{"train_iters": 6, **changes})


_behind: list[int] = []


def _watch():
    """Keep how many rows are behind whenever all are to catch up."""
    from ultramem_megatron.kernels.adam_rows import AdamRows

    catch_up = AdamRows.catch_up

    def watched(self, moments):
        current, history = self._behind
        _behind.append(int((current < history.count).sum()))
        catch_up(self, moments)

    AdamRows.catch_up = watched


def _moments(trained):
    """All moments, and what `_watch` saw."""
    single = getattr(trained.optimizer, "chained_optimizers", [trained.optimizer])
    states = [state for each in single for state in each.optimizer.state.values()]
    moments = [state[name].clone() for state in states for name in ("exp_avg", "exp_avg_sq")]
    return moments, _behind


def _trained(world_size, flags):
    return train(world_size, flags, before=_watch, on_finish=_moments)


def _assert_same(ours, dense):
    for mine, theirs in ((ours.losses, dense.losses), (ours.grad_norms, dense.grad_norms)):
        # As text: a step that was skipped has NaN.
        assert list(map(repr, mine)) == list(map(repr, theirs[-len(mine) :]))
    for mine, theirs in zip(ours.ranks, dense.ranks, strict=True):
        for name, parameter in theirs.parameters.items():
            assert torch.equal(mine.parameters[name], parameter), name
        (moments, _), (expected, none) = mine.finished, theirs.finished
        assert not none
        for found, wanted in zip(moments, expected, strict=True):
            assert torch.equal(found, wanted)


_LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {}),
        pytest.param(2, {"ultramem_partition": "number"}, marks=_LONG),
        pytest.param(2, {"ultramem_partition": "dimension"}, marks=_LONG),
        (2, _WHOLE),
        pytest.param(1, {"bf16": True}, marks=_LONG),
        pytest.param(
            2, {"fp16": True, "initial_loss_scale": 2**21, "hysteresis": 1, **_WHOLE}, marks=_LONG
        ),
        (2, {"use_distributed_optimizer": True}),
        pytest.param(2, {"use_distributed_optimizer": True, "bf16": True}, marks=_LONG),
        pytest.param(2, {"tensor_model_parallel_size": 2, **_WHOLE}, marks=_LONG),
        pytest.param(
            2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, **_WHOLE}, marks=_LONG
        ),
        pytest.param(
            1, {"ultramem_values": "prevalued", "ultramem_value_expansion": 1}, marks=_LONG
        ),
        pytest.param(
            1,
            {"num_layers": 4, "ultramem_spans": "1:2/3:4", "ultramem_share_values": 2},
            marks=_LONG,
        ),
        pytest.param(
            1,
            {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            },
            marks=_LONG,
        ),
        pytest.param(1, {"eval_iters": 1, "eval_interval": 2}, marks=_LONG),
        pytest.param(
            2,
            {"pipeline_model_parallel_size": 2, "num_layers": 4, "ultramem_spans": "1:2/3:4"},
            marks=_LONG,
        ),
        pytest.param(1, {"ultramem_value_lr_fixed": 1e-3}, marks=_LONG),
    ],
)
def test_every_bit_of_a_training_is_dense_adamws(world_size, changes):
    ours, dense = (_trained(world_size, _flags(**changes, **rows)) for rows in (_ROWS, {}))
    if "fp16" in changes:
        skipped = [bool(record["skipped"]) for record in ours.iterations]
        assert skipped[0]
        assert not skipped[-1]
    _assert_same(ours, dense)
    assert all(sum(rank.finished[1]) > 0 for rank in ours.ranks)


def _resume(folder, first, second):
    """Two steps with flags `first`, the rest with `second`."""
    saved = {"save": folder, "load": folder, "save_interval": 2, "load_or_start": True}
    train(1, _flags(ckpt_format="torch_dist", **saved, exit_interval=2, **first))
    return _trained(1, _flags(ckpt_format="torch_dist", **saved, **second))


@pytest.mark.parametrize("changes", [{}, pytest.param({"bf16": True}, marks=_LONG)])
@pytest.mark.parametrize(
    "switch",
    [
        (_ROWS, {}),
        pytest.param(({}, _ROWS), marks=_LONG),
        pytest.param((_ROWS, _ROWS), marks=_LONG),
    ],
)
def test_a_run_may_switch_at_a_checkpoint(switch, changes, tmp_path):
    before, after = ({**changes, **flags} for flags in switch)
    found = _resume(tmp_path, before, after)
    _assert_same(found, _trained(1, _flags(**changes)))


def test_another_optimizer_is_refused():
    config = UltraMemConfig(spans=(Span(1, 1),), num_keys=2, key_dim=4, value_dim=4, cores=1)
    layer = torch.nn.Module()
    layer.table, layer.groups, layer.token_group = ValueTable(config), None, None
    single = Namespace(optimizer=torch.optim.SGD(layer.parameters(), lr=1.0))
    with pytest.raises(UltraMemError, match=r"works with PyTorch's AdamW; .* is SGD"):
        visit_touched_rows(single, [layer])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "lion"}, "--optimizer lion cannot be combined with --ultramem-row-adam"),
        ({"ultramem_train_rows": 4}, "--ultramem-train-rows 4 cannot be combined with"),
        ({"log_params_norm": True}, "--log-params-norm cannot be combined with"),
        ({"check_weight_hash_across_dp_replicas_interval": 9}, "--check-weight-hash-across"),
        ({"ultramem_overlap": True}, "--ultramem-overlap cannot be combined .* share values"),
    ],
)
def test_what_cannot_leave_rows_behind_is_refused(changes, message):
    spans = (Span(1, 2), Span(3, 4))
    design = UltraMemConfig(
        spans=spans, num_keys=4, key_dim=4, value_dim=4, row_adam=True, share_values=2
    )
    refuse_row_adam(Namespace(optimizer="adam"), design)
    with pytest.raises(UltraMemError, match=message):
        refuse_row_adam(Namespace(**{"optimizer": "adam", **changes}), design)
