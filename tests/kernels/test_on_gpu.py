"""On a GPU: every op and a whole layer against the reference there; a resumed training."""

import os

import pytest
import torch

from launch.gpu_report.parts import parity
from tests.closeness import assert_close
from tests.kernels.lookup_cases import Sizes, inputs, main_grad_rounding, results
from tests.ranks import run_on_ranks
from tests.training_runs import run_pretrain, tiny_gpt
from ultramem_megatron.faults.unseen_gpus import refuse_unseen_gpus
from ultramem_megatron.kernels.lookup_prevalued import lookup_prevalued
from ultramem_megatron.kernels.lookup_reduce import lookup_reduce, lookup_reduce_reference
from ultramem_megatron.patches.registry import PATCH_MODULES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "ULTRAMEM_TEST_GPU" not in os.environ,
        reason="tests see a GPU only when asked to: bash tests/run.sh --gpu",
    ),
]

_MOST = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
_NEAR_TIES = 3e-2
"""Of two keys that score alike one implementation takes the one, one the other."""

_ALL = PATCH_MODULES
_UNFUSED = tuple(name for name in PATCH_MODULES if name != "defects.fused_adam")


@pytest.fixture(autouse=True, scope="module")
def a_gpu_that_torch_sees():
    refuse_unseen_gpus()
    assert torch.cuda.is_available(), "--gpu was given, but PyTorch sees no GPU here"


def test_every_op_equals_its_reference():
    rows = list(parity.rows(large=True))
    assert not [row for row in rows if row.error]
    errors = {row.what: row.value for row in rows if row.unit.startswith("relative")}
    assert errors
    for what, error in errors.items():
        exact = what.startswith(("lookup", "query convolution"))
        dtype = next(dtype for dtype in ("bfloat16", "float16", "float32") if dtype in what)
        most = _MOST[dtype] if exact else _NEAR_TIES
        assert error <= most, what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [3, 600])
def test_kernels_read_tables_in_pinned_host_memory(dtype, tokens):
    """To the bit what they read of the same table on the GPU."""
    table, before = (torch.randn(1000, width, dtype=dtype).pin_memory() for width in (96, 40))
    rows = torch.randint(1000, (tokens, 20), device="cuda")
    groups = torch.randint(4, (tokens, 20), device="cuda")
    scores = torch.randn(tokens, 20, 2, device="cuda")
    x = torch.randn(tokens, 40, device="cuda", dtype=dtype)
    with torch.no_grad():
        found = lookup_reduce(table, rows, groups, scores, 4)
        behind = lookup_prevalued(table, before, rows, groups, scores, x, 4, "gelu")
        there, before = table.cuda(), before.cuda()
        assert torch.equal(found, lookup_reduce(there, rows, groups, scores, 4))
        expected = lookup_prevalued(there, before, rows, groups, scores, x, 4, "gelu")
        assert torch.equal(behind, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("deterministic", [False, True])
def test_micro_batches_add_up_in_main_grad(dtype, deterministic):
    sizes = Sizes(33, 63, 2, 40, 4, rows=50)  # many tokens a row
    table = inputs(sizes).table.detach().float().cuda().requires_grad_()
    torch.use_deterministic_algorithms(deterministic)
    try:
        added = []
        for _ in range(2):
            table.main_grad = torch.zeros_like(table, dtype=dtype)
            for seed in (4, 5):
                case = inputs(sizes, torch.float32, seed)
                rows, groups, scores, grad = (case[i].detach().cuda() for i in (1, 2, 3, 5))
                lookup_reduce(table, rows, groups, scores, case.num_groups).backward(grad)
                table.grad = None  # as Megatron's hook does
            added.append(table.main_grad)
    finally:
        torch.use_deterministic_algorithms(False)
    batches = [inputs(sizes, seed=seed)._replace(table=inputs(sizes).table) for seed in (4, 5)]
    exact = sum(results(lookup_reduce_reference, batch)[1] for batch in batches)
    assert_close(added[0].double().cpu(), exact, main_grad_rounding(dtype, sizes))
    assert torch.equal(*added) or not deterministic


@pytest.mark.parametrize("flags", [{}, {"ultramem_query_conv_kernel": 5, "ultramem_spans": "1:1"}])
def test_a_training_has_the_losses_of_the_reference(flags):
    memory = {"ultramem_spans": "1:2", "ultramem_num_keys": 40, "ultramem_topk": 16}
    argv = tiny_gpt(**{**memory, **flags}, train_iters=5)
    found, expected = (
        run_pretrain(1, argv, env={"ULTRAMEM_KERNELS": kernels}).losses
        for kernels in ("triton", "reference")
    )
    assert found == pytest.approx(expected, rel=1e-5)


def _graphed():
    """Logits of a decode step, and of the graph of one, on new numbers in the same memory."""
    from launch.benchmarks.decode_step import DecodeStep
    from ultramem_megatron.inference.loading import prepare_for_inference
    from ultramem_megatron.inference.untrained import untrained_model

    memory = {"ultramem_spans": "1:2", "ultramem_num_keys": 12, "ultramem_topk": 6}
    model, _ = untrained_model(tiny_gpt(**memory, bf16=True))
    prepare_for_inference(model)
    step = DecodeStep(model, [3, 3], 500)
    with torch.no_grad():
        step()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step()
        step.tokens.copy_(step.tokens.flip(0))
        graph.replay()
        return logits.cpu(), step().cpu()


def test_a_graph_of_a_decode_step_computes_it():
    ((replayed, stepped),) = run_on_ranks(1, _graphed)
    assert torch.equal(replayed, stepped)


def _where(trained):
    """Devices of the tables, and of all else."""
    from ultramem_megatron.memory.tables.value_table import value_tables

    tables = [t.weight for chunk in trained.model for t in value_tables(chunk).values()]
    others = [p for chunk in trained.model for p in chunk.parameters()]
    held = {id(table) for table in tables}
    return {t.device.type for t in tables}, {p.device.type for p in others if id(p) not in held}


@pytest.mark.parametrize("flags", [{}, {"bf16": True}], ids=["float32", "bfloat16"])
def test_tables_in_host_memory_train_as_on_the_device(flags):
    memory = {"ultramem_spans": "1:2", "ultramem_num_keys": 12, "ultramem_topk": 6}
    argv = {**memory, **flags, "deterministic_mode": True}
    device = run_pretrain(1, tiny_gpt(**argv), on_finish=_where)
    host = run_pretrain(1, tiny_gpt(**argv, ultramem_table_memory="host"), on_finish=_where)
    assert host.losses == pytest.approx(device.losses, rel=1e-2 if flags else 1e-4)
    assert host.grad_norms == pytest.approx(device.grad_norms, rel=1e-2 if flags else 1e-3)
    assert device.ranks[0].finished == ({"cuda"}, {"cuda"})
    assert host.ranks[0].finished == ({"cpu"}, {"cuda"})


def _adam(trained):
    """Whether it is fused, on which devices steps are counted, and their number."""
    chained = getattr(trained.optimizer, "chained_optimizers", [trained.optimizer])
    inner = [one.optimizer for one in chained]
    steps = [state["step"] for adam in inner for state in adam.state.values()]
    fused = {group["fused"] for adam in inner for group in adam.param_groups}
    return fused, {step.device.type for step in steps}, {float(step) for step in steps}


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"bf16": True},
        {"use_distributed_optimizer": True},
        {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": True},
    ],
    ids=["float32", "bfloat16", "distributed", "distributed, reshardable"],
)
@pytest.mark.parametrize("saved_by", [_ALL, _UNFUSED], ids=["saved fused", "saved unfused"])
def test_a_resumed_training_goes_on_as_if_uninterrupted(flags, saved_by, tmp_path):
    """The fused kernel reads the number of steps on the GPU; checkpoints hold it on the CPU."""
    memory = {"ultramem_spans": "1:2", "ultramem_num_keys": 12, "ultramem_topk": 6}
    argv = {**memory, **flags, "train_iters": 4, "deterministic_mode": True}
    half = {"save": tmp_path, "save_interval": 2, "exit_interval": 2}
    saved = run_pretrain(1, tiny_gpt(**argv, **half), patches=saved_by)
    resumed = run_pretrain(1, tiny_gpt(**argv, load=tmp_path), on_finish=_adam)
    whole = run_pretrain(1, tiny_gpt(**argv), on_finish=_adam)
    exact = saved_by is _ALL
    found = [*saved.losses, *resumed.losses]
    assert found == (whole.losses if exact else pytest.approx(whole.losses, rel=1e-4))
    assert resumed.ranks[0].finished == whole.ranks[0].finished == ({True}, {"cuda"}, {4.0})
