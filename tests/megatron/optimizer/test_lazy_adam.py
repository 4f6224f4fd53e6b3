"""Lazy Adam: rows with a gradient as AdamW has it, the others untouched."""

import pytest
import torch

from tests.closeness import assert_close, rounding
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
