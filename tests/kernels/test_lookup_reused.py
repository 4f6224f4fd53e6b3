"""Dense gradients without main_grad: right whatever others do with them, in memory used again."""

import copy
import pickle

import pytest
import torch

from tests.closeness import assert_close
from tests.kernels.lookup_cases import Sizes, exact_rounding, inputs, results
from tests.ranks import init_gloo, run_on_ranks
from ultramem_megatron.kernels.lookup_reduce import lookup_reduce, lookup_reduce_reference, reused

_SIZES = Sizes(5, 3, 2, 3, 4, rows=30_000)  # of which some are looked at


def _backward(table, seed, lookup=lookup_reduce, sizes=_SIZES):
    case = inputs(sizes, table.dtype, seed)
    lookup(table, *case[1:5]).backward(case.grad)
    return table.grad


def _expected(*seeds):
    cases = [inputs(_SIZES, seed=seed) for seed in seeds]
    table = inputs(_SIZES).table
    return sum(results(lookup_reduce_reference, case._replace(table=table))[1] for case in cases)


def _table():
    return inputs(_SIZES).table.detach().clone().requires_grad_()


def _is_right(table, *seeds):
    assert_close(table.grad, _expected(*seeds), exact_rounding(_SIZES))


def test_the_next_step_adds_to_the_same_memory():
    table, places = _table(), set()
    for seed in (4, 5, 6):
        places.add(_backward(table, seed).data_ptr())
        _is_right(table, seed)
        table.grad = None
    assert len(places) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [6, 300])
def test_neither_few_rows_nor_all_keep_what_was_added_before(rows, dtype):
    sizes = _SIZES._replace(rows=rows)
    table = inputs(sizes, dtype).table
    for seed in (4, 5):
        found = _backward(table, seed, sizes=sizes)
        alone = _backward(inputs(sizes, dtype).table, seed, sizes=sizes)
        assert torch.equal(found, alone)
        table.grad = found = None


def test_without_the_private_count_of_torch_every_step_has_memory_of_its_own(monkeypatch):
    monkeypatch.setattr(reused, "_use_count", None)
    table, kept = _table(), []
    for seed in (4, 5):
        kept.append(_backward(table, seed))
        _is_right(table, seed)
        table.grad = None
    assert kept[0].data_ptr() != kept[1].data_ptr()


def _noise(table):
    table.grad.add_(1.0)


def _noise_unseen(table):
    table.grad.data.add_(1.0)


def _second_backward(table):
    _backward(table, 9)


def _clip(table):
    torch.nn.utils.clip_grad_norm_([table], 1e-3)


def _step(table):
    torch.optim.SGD([table], lr=0.0, weight_decay=0.1, momentum=0.9).step()


@pytest.mark.parametrize("change", [_noise, _noise_unseen, _second_backward, _clip, _step])
def test_what_others_wrote_is_not_in_the_next_gradient(change):
    table = _table()
    for seed in (4, 5):
        _backward(table, seed)
        _is_right(table, seed)
        change(table)
        table.grad = None


def test_backwards_of_one_step_add_up():
    table = _table()
    for first in (4, 6):
        _backward(table, first)
        _backward(table, first + 1)
        _is_right(table, first, first + 1)
        table.grad = None


def test_a_graph_can_be_walked_twice():
    table, case = _table(), inputs(_SIZES, seed=4)
    out = lookup_reduce(table, *case[1:5])
    out.backward(case.grad, retain_graph=True)
    table.grad = None
    out.backward(case.grad, retain_graph=True)
    out.backward(case.grad)
    _is_right(table, 4, 4)


def test_a_gradient_that_was_put_aside_stays_as_it_is():
    table = _table()
    kept = _backward(table, 4)
    table.grad = None
    _backward(table, 5)
    _is_right(table, 5)
    assert_close(kept, _expected(4), exact_rounding(_SIZES))
    part = table.grad[3:9]  # holds the memory, too
    table.grad = None
    before = part.clone()
    _backward(table, 4)
    assert torch.equal(part, before)


def test_gradients_that_are_only_asked_for_are_right():
    table = _table()
    for seed in (4, 5):
        case = inputs(_SIZES, seed=seed)
        [found] = torch.autograd.grad(lookup_reduce(table, *case[1:5]), [table], case.grad)
        assert_close(found, _expected(seed), exact_rounding(_SIZES))
        del found
    assert table.grad is None


def test_zeroed_gradients_are_added_to():
    table = _table()
    for seed in (4, 5):
        _backward(table, seed)
        _is_right(table, seed)
        table.grad.zero_()


def test_a_backward_that_fails_leaves_nothing_behind():
    table, case = _table(), inputs(_SIZES, seed=4)
    _backward(table, 5)
    table.grad = None
    out = lookup_reduce(table, *case[1:5])
    wrong = lookup_reduce(table, *case[1:5])
    wrong.register_hook(lambda grad: grad[:, :, :1])  # too narrow: the kernel refuses it
    with pytest.raises((RuntimeError, IndexError)):
        wrong.backward(case.grad)
    table.grad = None
    out.backward(case.grad)
    _is_right(table, 4)


def test_other_contents_get_other_memory():
    table = _table()
    _backward(table, 4)
    table.grad = None
    table.data = table.data.float()
    _backward(table, 4, lambda *case: lookup_reduce(*case).double())
    assert table.grad.dtype == torch.float32


def test_the_memory_is_neither_copied_nor_saved_with_a_table():
    table = torch.nn.Parameter(_table().detach())
    alone = len(pickle.dumps(table))
    _backward(table, 4)
    table.grad = None
    assert len(pickle.dumps(table)) == alone
    other = copy.deepcopy(table)
    _backward(table, 4)
    _backward(other, 5)
    _is_right(table, 4)
    _is_right(other, 5)


class _Reads(torch.nn.Module):
    def __init__(self, lookup):
        super().__init__()
        self.table, self.lookup = torch.nn.Parameter(_table().detach()), lookup

    def forward(self, seed):
        return self.lookup(self.table, *inputs(_SIZES, seed=seed)[1:5])


def _trained(lookup):
    """Gradients of each step of AdamW under DDP, whose ranks read different rows."""
    rank = torch.distributed.get_rank()
    model = torch.nn.parallel.DistributedDataParallel(_Reads(lookup))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gradients = []
    for step in range(3):
        model(2 * step + rank).backward(inputs(_SIZES).grad)
        gradients.append(model.module.table.grad.clone())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return gradients


def _reduced_by_hand(lookup):
    """Gradients of each step, summed over ranks in place, of which a tensor's version tells not."""
    table, rank = _table(), torch.distributed.get_rank()
    gradients = []
    for step in range(3):
        torch.distributed.all_reduce(_backward(table, 2 * step + rank, lookup))
        gradients.append(table.grad.clone())
        table.grad = None
    return gradients


def _both(trained):
    init_gloo()
    return trained(lookup_reduce), trained(lookup_reduce_reference)


@pytest.mark.parametrize("trained", [_trained, _reduced_by_hand])
def test_data_parallel_training_is_the_same(trained):
    for found, expected in run_on_ranks(2, _both, trained):
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, 100 * exact_rounding(_SIZES))
