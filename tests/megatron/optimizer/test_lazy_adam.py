"""Lazy Adam: rows with a gradient as AdamW has it, the others untouched."""

import pytest
import torch

from tests.closeness import assert_close, rounding
from tests.training_runs import tiny_gpt
from tests.whole_model import assert_same_training, train, whole
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.optimizer import lazy_rows
from ultramem_megatron.megatron.optimizer.lazy_adam import make_lazy

# What a step does to a number, one operation after the other.
_STEP = rounding(torch.float64, 8)
_SETTINGS = {"lr": 0.1, "weight_decay": 0.3, "betas": (0.8, 0.9)}


def _optimizers():
    """(parameters, optimizer) twice, the second one lazy; parameters are a table and a matrix."""
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        pair = [torch.randn(n, 3, dtype=torch.float64).requires_grad_() for n in (7, 2)]
        found.append((pair, torch.optim.AdamW(pair, **_SETTINGS)))
    make_lazy(found[1][1], [found[1][0][0]])
    return found


def _step(parameters, optimizer, rows):
    torch.manual_seed(len(rows))
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    kept = torch.zeros(len(parameters[0]), 1, dtype=torch.float64)
    kept[rows] = 1
    parameters[0].grad *= kept
    optimizer.step()


@pytest.mark.parametrize("rows_at_once", [2, 2**16])
def test_with_every_row_in_use_it_is_adamw(rows_at_once, monkeypatch):
    monkeypatch.setattr(lazy_rows, "ROWS_AT_ONCE", rows_at_once)
    dense, lazy = _optimizers()
    for _ in range(4):
        for pair in (dense, lazy):
            _step(*pair, list(range(7)))
    for ours, theirs in zip(lazy[0], dense[0], strict=True):
        assert_close(ours, theirs, 4 * _STEP)


def test_a_row_with_gradient_moves_as_under_adamw_and_the_others_not_at_all():
    (dense, adamw), (lazy, optimizer) = _optimizers()
    for pair in ((dense, adamw), (lazy, optimizer)):
        _step(*pair, list(range(7)))
    before = {name: t.clone() for name, t in optimizer.state[lazy[0]].items()}
    values = lazy[0].detach().clone()
    for pair in ((dense, adamw), (lazy, optimizer)):
        _step(*pair, [1, 4])
    other = [0, 2, 3, 5, 6]
    assert torch.equal(lazy[0][other], values[other])
    assert_close(lazy[0][[1, 4]], dense[0][[1, 4]], 2 * _STEP)
    for name in ("exp_avg", "exp_avg_sq"):
        found = optimizer.state[lazy[0]][name]
        assert torch.equal(found[other], before[name][other])
        assert_close(found[[1, 4]], adamw.state[dense[0]][name][[1, 4]], 2 * _STEP)
    assert not torch.equal(dense[0][other], values[other])
    assert torch.equal(lazy[1], dense[1])


def test_another_optimizer_is_refused():
    table = torch.zeros(2, 2, requires_grad=True)
    with pytest.raises(UltraMemError, match=r"works with PyTorch's AdamW; .* is SGD"):
        make_lazy(torch.optim.SGD([table], lr=1.0), [table])


def _flags(**changes):
    return tiny_gpt(
        ultramem_spans="1:2",
        ultramem_num_keys=23,
        ultramem_topk=2,
        ultramem_value_dim=16,
        ultramem_parallel_size=2,
        disable_bias_linear=True,
        **{"weight_decay": 0.0, **changes},
    )


@pytest.mark.parametrize("bf16", [False, True])
def test_the_first_step_of_a_training_run_is_adams(bf16):
    runs = [
        train(2, _flags(train_iters=1, bf16=bf16, ultramem_lazy_adam=lazy))
        for lazy in (True, False)
    ]
    assert_same_training(*runs, rounding(torch.float32, 8))


def test_in_training_rows_that_no_token_reads_stay():
    run = train(2, _flags(ultramem_lazy_adam=True, weight_decay=0.5), initial_parameters=True)
    dense = train(2, _flags(weight_decay=0.5))
    (before,) = whole(run, "initial_parameters", "values.weight").values()
    (after,) = whole(run, "parameters", "values.weight").values()
    (decayed,) = whole(dense, "parameters", "values.weight").values()
    same = (before == after).all(1)
    assert 0 < int(same.sum()) < len(before)
    assert not (before == decayed).all(1).any()
