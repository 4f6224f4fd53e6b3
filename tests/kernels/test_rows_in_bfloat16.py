"""AdamW on rows of bfloat16 tables without a float32 copy, beside one that has it."""

import pytest
import torch

from tests.closeness import relative_error
from ultramem_megatron.kernels.adam_rows import AdamRows, AdamStep, Moments
from ultramem_megatron.kernels.adam_rows.compact import KINDS, compact
from ultramem_megatron.kernels.adam_rows.rounding import Rounding

_ROWS, _WIDTH, _STEPS = 48, 64, 30
_KEY = 7
_LEVEL = 2**-7
"""Between neighbours in bfloat16, at most, as a fraction of either."""


def _step(number, lr=3e-4):
    return AdamStep(lr, 0.1, 0.9, 0.95, 1e-8, number)


def _moments(values, rounding, kind="float32"):
    if kind != "float32":
        return compact(kind, values, None, rounding=rounding)
    zeros = [torch.zeros(values.shape) for _ in range(2)]
    return Moments(values, *zeros, None, rounding)


def _trained(moments, rows=slice(None), columns=slice(None), steps=_STEPS, look=()):
    """Steps in which some rows of a whole table have a gradient, of this part of it."""
    generator = torch.Generator().manual_seed(3)
    behind = AdamRows(len(moments.values), torch.device("cpu"))
    for number in range(1, steps + 1):
        read = torch.rand(_ROWS, generator=generator) < 0.2
        gradient = torch.randn(_ROWS, _WIDTH, generator=generator) * read[:, None]
        if number in look:
            behind.read(moments, torch.arange(len(moments.values)))
            behind.touched.zero_()
        behind.read(moments, read[rows].nonzero().flatten())
        behind.step(moments, gradient[rows, columns].contiguous(), _step(number))
    behind.catch_up(moments)
    return moments.values


def _start():
    return torch.randn(_ROWS, _WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.mark.parametrize(
    "kind", ["float32", *(pytest.param(kind, marks=pytest.mark.long) for kind in KINDS)]
)
def test_on_average_values_are_those_of_a_float32_copy(kind):
    """Rounded to nearest, most values would have stayed where they were."""
    wanted = _trained(_moments(_start().float(), None, kind))
    drawn = torch.stack(
        [_trained(_moments(_start(), Rounding(key), kind)).double() for key in range(16)]
    )
    moved = wanted.double() - _start().double()
    off = drawn.mean(0) - wanted.double()
    assert float(moved.abs().mean()) < _LEVEL  # steps are of less than a level
    assert float(off.mean()) == pytest.approx(0, abs=0.02 * float(moved.abs().mean()))
    along = ((drawn.mean(0) - _start().double()) * moved).sum() / moved.square().sum()
    assert float(along) == pytest.approx(1, abs=0.03)
    assert relative_error(drawn[0], wanted) < 2 * _LEVEL


@pytest.mark.parametrize(
    ("kind", "rows", "columns"),
    [
        ("float32", (16, 48), (0, 64)),
        ("float32", (0, 48), (32, 64)),
        ("float32", (7, 30), (32, 64)),
        ("factored", (7, 30), (0, 64)),
    ],
)
def test_a_part_of_a_table_is_rounded_as_in_the_whole(kind, rows, columns):
    rows, columns = slice(*rows), slice(*columns)
    whole = _trained(_moments(_start(), Rounding(_KEY), kind))
    part = _start()[rows, columns].contiguous()
    rounding = Rounding(_KEY, rows.start, columns.start)
    assert torch.equal(
        _trained(_moments(part, rounding, kind), rows, columns), whole[rows, columns]
    )


def test_every_row_is_brought_up_to_date_in_its_turn(monkeypatch):
    """Whoever has it: a part's rows at the steps at which the whole table's are."""
    from ultramem_megatron.kernels.adam_rows import history, native_path, table

    for module in (table, history, native_path):
        monkeypatch.setattr(module, "SLOTS", 8)
    whole = _trained(_moments(_start(), Rounding(_KEY)))
    part = _trained(_moments(_start()[13:].clone(), Rounding(_KEY, 13)), slice(13, None))
    assert torch.equal(part, whole[13:])


def test_draws_are_even_and_of_their_own():
    draws = Rounding(_KEY).draws(torch.arange(2000), 64, 5).double() / 2**16
    assert float(draws.mean()) == pytest.approx(0.5, abs=0.004)
    assert float(draws.std()) == pytest.approx(12**-0.5, abs=0.004)
    centred = draws - draws.mean()
    others = [
        Rounding(key).draws(torch.arange(2000), 64, step).double() / 2**16 - 0.5
        for key, step in ((_KEY + 1, 5), (_KEY, 6))
    ]
    for first, second in (
        (centred[1:], centred[:-1]),
        (centred[:, 1:], centred[:, :-1]),
        *((centred, other) for other in others),
    ):
        assert abs(float((first * second).mean())) * 12 < 0.02


def test_what_is_exact_or_not_finite_stays():
    values = torch.tensor([[1.0, -0.0, 0.0, float("inf"), -float("inf"), float("nan"), 2**-130]])
    found = Rounding(_KEY).rounded(values, torch.tensor([0]), 1)
    assert torch.equal(found.float().nan_to_num(7), values.nan_to_num(7))
