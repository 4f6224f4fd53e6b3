"""--ultramem-table-memory host: training, checkpoints and evaluation are those of the device."""

from argparse import Namespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.megatron.optimizer.host_runs import (
    SKIPPING,
    assert_same,
    assert_trained_alike,
    flags,
    trained,
)
from tests.training_runs import run_pretrain
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.flags.table_memory_flags import refuse_table_memory
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.spans import Span

_HOST = {"ultramem_table_memory": "host"}
_WHOLE = {"ultramem_parallel_size": 1}
_LONG = pytest.mark.long


def test_one_micro_batch_without_clipping_is_the_device_s_to_the_bit():
    """Nothing is then added up in another order, nor scaled."""
    given = {"global_batch_size": 1, "clip_grad": 0.0}
    assert_same(*(trained(1, flags(**given, **more)) for more in (_HOST, {})), 0)


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        pytest.param(1, {}, id="accumulation, clipping"),
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
        pytest.param(2, {"tensor_model_parallel_size": 2}, id="TP", marks=_LONG),
        pytest.param(
            2,
            {"tensor_model_parallel_size": 2, "sequence_parallel": True, **_WHOLE},
            id="TP, sequence parallel",
            marks=_LONG,
        ),
        pytest.param(2, {"pipeline_model_parallel_size": 2, "num_layers": 4}, id="PP", marks=_LONG),
        pytest.param(2, {"context_parallel_size": 2}, id="CP", marks=_LONG),
        pytest.param(
            1, {"ultramem_values": "prevalued", "ultramem_value_expansion": 1}, id="pre-values"
        ),
        pytest.param(
            2,
            {
                "ultramem_values": "prevalued",
                "ultramem_value_expansion": 1,
                "ultramem_partition": "dimension",
            },
            id="pre-values, dimension",
            marks=_LONG,
        ),
        pytest.param(
            1,
            {"num_layers": 4, "ultramem_spans": "1:2/3:4", "ultramem_share_values": 2},
            id="shared values",
            marks=_LONG,
        ),
        pytest.param(
            1,
            {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            },
            id="recomputation",
            marks=_LONG,
        ),
        pytest.param(1, {"eval_iters": 1, "eval_interval": 2}, id="evaluation", marks=_LONG),
        pytest.param(2, {"ultramem_overlap": True}, id="overlap", marks=_LONG),
        pytest.param(
            2, {**_WHOLE, "overlap_grad_reduce": True}, id="overlapped reduction", marks=_LONG
        ),
        pytest.param(
            2, {**_WHOLE, "calculate_per_token_loss": True}, id="per-token loss", marks=_LONG
        ),
        pytest.param(1, {"ultramem_value_lr_fixed": 1e-3}, id="fixed rate", marks=_LONG),
        pytest.param(1, {"bf16": True}, id="bf16", marks=_LONG),
        pytest.param(2, {**SKIPPING, **_WHOLE}, id="fp16, skipped steps", marks=_LONG),
    ],
)
def test_training_is_the_device_s(world_size, changes):
    ours, device = (trained(world_size, flags(**changes, **more)) for more in (_HOST, {}))
    assert_trained_alike(ours, device, changes)


@pytest.mark.parametrize(
    "changes", [{}, pytest.param({"bf16": True, "ultramem_values": "gated"}, marks=_LONG)]
)
@pytest.mark.parametrize(
    "switch",
    [
        pytest.param((_HOST, {}), id="to the device"),
        pytest.param(({}, _HOST), id="to the host", marks=_LONG),
        pytest.param((_HOST, _HOST), id="on the host"),
    ],
)
def test_a_run_may_move_at_a_checkpoint(switch, changes, tmp_path):
    saved = {"save": tmp_path, "load": tmp_path, "save_interval": 2, "load_or_start": True}
    saved |= {"ckpt_format": "torch_dist", "global_batch_size": 1, "clip_grad": 0.0}
    before, after = ({**changes, **saved, **more} for more in switch)
    run_pretrain(1, flags(**before, exit_interval=2))
    ours = trained(1, flags(**after))
    whole = trained(1, flags(**{**changes, "global_batch_size": 1, "clip_grad": 0.0}))
    for rank in whole.ranks:
        del rank.iterations[:2]
    assert_same(ours, whole, 0)


class _Crossing(TorchDispatchMode):
    """Sees each operation on a tensor of a table's size, and the bytes that rows take across."""

    def __init__(self, tables):
        super().__init__()
        self.large = min(table.weight.numel() for table in tables)
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        tensors = [t for t in (*args, found) if isinstance(t, torch.Tensor) and not t.is_sparse]
        if any(t.untyped_storage().nbytes() >= 4 * self.large for t in tensors):
            self.seen.add(str(function))
        return found


def test_a_read_and_its_backward_touch_rows_and_nothing_of_the_tables_size():
    """Of the table itself rows are gathered, and of its gradient rows are added to."""
    from ultramem_megatron.communication.pausing import run
    from ultramem_megatron.memory.tables.value_table import ValueTable, in_host_memory

    config = UltraMemConfig(
        spans=(Span(1, 1),), num_keys=64, key_dim=4, value_dim=8, value_expansion=1, cores=1
    )
    with in_host_memory():
        table = ValueTable(config)
    table.weight.data.normal_()
    table.stand_in.main_grad = torch.zeros(1, 1)
    addresses, scores = torch.randint(4096, (3, 5)), torch.randn(3, 5, 1)
    with _Crossing([table]) as crossing:
        run(table(addresses, scores)).sum().backward()
    allowed = {"aten.index.Tensor", "aten.detach.default", "aten.zeros.default"}
    assert crossing.seen <= allowed | {"aten.index_add_.default"}
    assert float(table.stand_in.main_grad) == 1
    wanted = torch.zeros(4096, 8).index_add_(
        0, addresses.flatten(), scores.flatten()[:, None].expand(15, 8)
    )
    torch.testing.assert_close(table.rows.gradient, wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_megatron_fsdp": True}, "--use-megatron-fsdp cannot be combined"),
        ({"use_torch_fsdp2": True}, "--use-torch-fsdp2 cannot be combined"),
        ({"ultramem_train_only": "memory"}, "--ultramem-train-only memory cannot be combined"),
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl local cannot be combined"),
        ({"optimizer": "sgd"}, "--optimizer sgd cannot be combined with --ultramem-table-memory"),
        ({"log_params_norm": True}, "--log-params-norm cannot be combined"),
    ],
)
def test_what_needs_tables_on_the_device_is_refused(changes, message):
    design = UltraMemConfig(spans=(Span(1, 2),), num_keys=4, key_dim=4, value_dim=4)
    given = Namespace(
        optimizer="adam", ultramem_table_memory="host", cuda_graph_impl="none", async_save=False
    )
    refuse_table_memory(given, design)
    vars(given).update(changes)
    with pytest.raises(UltraMemError, match=message):
        refuse_table_memory(given, design)
    given.ultramem_table_memory = "device"
    refuse_table_memory(given, design)


def test_beside_a_gpu_no_other_process_writes_them(monkeypatch):
    """torch hands tensors of the host to it in memory that both write and read."""
    design = UltraMemConfig(spans=(Span(1, 2),), num_keys=4, key_dim=4, value_dim=4)
    given = Namespace(
        optimizer="adam", ultramem_table_memory="host", cuda_graph_impl="none", async_save=True
    )
    refuse_table_memory(given, design)  # on a CPU a fork has what was there
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(UltraMemError, match="--async-save cannot be combined with --ultramem-tab"):
        refuse_table_memory(given, design)
