"""Where the table's gradient goes: Megatron's main_grad, at no cost that grows with the table."""

import re
from pathlib import Path

import pytest
import torch

from tests.closeness import assert_close
from tests.kernels.lookup_cases import Sizes, exact_rounding, inputs, main_grad_rounding, results
from tests.ranks import run_on_ranks
from tests.training_runs import tiny_gpt
from tests.whole_model import assert_same_training, train
from ultramem_megatron.kernels.lookup_reduce import lookup_reduce, lookup_reduce_reference

_SIZES = Sizes(9, 7, 2, 3, 4)


def _dense(*seeds):
    """Sum of the reference's table gradients over micro-batches."""
    case = inputs(_SIZES)
    batches = [inputs(_SIZES, seed=seed)._replace(table=case.table) for seed in seeds]
    return sum(results(lookup_reduce_reference, batch)[1] for batch in batches)


@pytest.mark.parametrize(
    ("table_dtype", "dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_micro_batches_add_up_in_main_grad(table_dtype, dtype):
    table = inputs(_SIZES, table_dtype).table
    table.main_grad = torch.zeros_like(table, dtype=dtype)
    for seed in (4, 5):
        case = inputs(_SIZES, table_dtype, seed)
        lookup_reduce(table, *case[1:5]).backward(case.grad)
        assert table.grad_added_to_main_grad
        assert table.grad.is_sparse
        assert table.grad._nnz() == 0
        table.grad = None  # as Megatron's hook does
    assert_close(table.main_grad.double(), _dense(4, 5), main_grad_rounding(dtype, _SIZES))


def test_a_gradient_in_half_precision_is_rounded_once_a_backward():
    case = inputs(_SIZES, torch.bfloat16)
    table = case.table
    table.main_grad = torch.zeros_like(table)
    lookup_reduce(*case[:5]).backward(case.grad)
    exact = results(lookup_reduce_reference, inputs(_SIZES))[1]
    assert (table.main_grad == exact.bfloat16()).float().mean() > 0.99


def test_without_main_grad_a_table_may_ask_for_a_sparse_gradient():
    case = inputs(_SIZES, seed=4)._replace(table=inputs(_SIZES).table)
    case.table.ultramem_sparse_gradient = True
    lookup_reduce(*case[:5]).backward(case.grad)
    assert case.table.grad.is_sparse
    assert_close(case.table.grad.to_dense(), _dense(4), exact_rounding(_SIZES))
    torch.optim.SparseAdam([case.table]).step()


def _memory(field):
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def _extra_memory_of_backward(rows):
    """Bytes at the peak of a backward above what was there before it."""
    case = inputs(Sizes(64, 32, 2, 64, 4, rows=rows), torch.float32)
    case.table.main_grad = torch.zeros_like(case.table) + 0.0  # + 0: every page is resident
    for _ in range(2):  # the first time PyTorch sets up what it needs for ever
        out = lookup_reduce(*case[:5])
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _memory("VmRSS")
        out.backward(case.grad)
    return _memory("VmHWM") - before


def test_peak_memory_of_backward_does_not_grow_with_the_table():
    small, large = (run_on_ranks(1, _extra_memory_of_backward, n)[0] for n in (2**12, 2**18))
    table_bytes = 2**18 * 128 * 4
    assert abs(large - small) < table_bytes // 16


def _path(trained):
    from ultramem_megatron.tools.verify_parallel.whole_model import pieces

    tables = [p for p in trained.model[0].parameters() if hasattr(p, "ultramem_values")]
    trained.args.used_main_grad = [p.grad_added_to_main_grad for p in tables]
    return pieces(trained.model), trained.args.used_main_grad


@pytest.mark.parametrize("overlapped", [False, True])
def test_megatron_trains_the_same_model(overlapped):
    flags = tiny_gpt(
        ultramem_spans="1:2",
        ultramem_num_keys=11,
        ultramem_topk=6,
        ultramem_value_dim=16,
        ultramem_parallel_size=1,
        disable_bias_linear=True,
        clip_grad=0.5,
        overlap_grad_reduce=overlapped,
        overlap_param_gather=overlapped,
        use_distributed_optimizer=overlapped,
    )
    ours, reference = (
        train(2, flags, env={"ULTRAMEM_KERNELS": kernels}, on_finish=_path)
        for kernels in ("torch", "reference")
    )
    for run, direct in ((ours, True), (reference, False)):
        for rank in run.ranks:
            rank.finished, used = rank.finished
            assert used == [direct]
    assert_same_training(ours, reference, gradients=not overlapped)
