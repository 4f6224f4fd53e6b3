"""AdamW on rows with smaller moments, beside the same steps on all rows in float64."""

import pytest
import torch

from tests.closeness import relative_error
from ultramem_megatron.kernels.adam_rows import AdamRows, AdamStep
from ultramem_megatron.kernels.adam_rows.compact import KINDS, CodedRows, compact, expand, pack

_ROWS, _WIDTH, _STEPS = 40, 64, 60
_OFF = {"factored": 2e-5, "bfloat16": 2**-8, "int8": 0.01}
"""Of what the steps moved values by; half a level of bfloat16 is 2^-9, of int8 1/254."""


def _step(number):
    return AdamStep(1e-2, 0.1, 0.9, 0.999, 1e-8, number)


def _in_float64(start, gradients):
    """Values and mean of all rows, with one second moment a row."""
    values, mean = start.double(), torch.zeros_like(start, dtype=torch.float64)
    square = torch.zeros(len(start), 1, dtype=torch.float64)
    for number, gradient in enumerate(gradients, 1):
        lr, decay, beta1, beta2, eps, _ = _step(number)
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient.double().square().mean(1, keepdim=True)
        root = (square / (1 - beta2**number)).sqrt() + eps
        values = values * (1 - lr * decay) - lr / (1 - beta1**number) * mean / root
    return values, mean


def _gradients(generator):
    """Of a few rows in each step; the last rows never have one."""
    for _ in range(_STEPS):
        rows = torch.randint(_ROWS - 7, (9,), generator=generator)
        gradient = torch.zeros(_ROWS, _WIDTH)
        gradient[rows] = torch.randn(len(rows), _WIDTH, generator=generator)
        yield gradient


@pytest.mark.parametrize("kind", KINDS)
def test_values_move_as_in_float64(kind):
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(_ROWS, _WIDTH, generator=generator)
    gradients = list(_gradients(generator))
    moments = compact(kind, start.clone(), start.bfloat16())
    rows = AdamRows(_ROWS, start.device)
    for number, gradient in enumerate(gradients, 1):
        rows.read(moments, gradient.any(1).nonzero().flatten())
        rows.step(moments, gradient, _step(number))
    rows.catch_up(moments)
    values, mean = _in_float64(start, gradients)
    moved = relative_error(moments.values.double() - start.double(), values - start.double())
    assert moved <= _OFF[kind]
    assert relative_error(expand(moments)[0].double(), mean) <= 2 * _OFF[kind]
    assert torch.equal(moments.copy, moments.values.bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_catching_up_in_parts_changes_no_code(kind):
    """So ranks may bring a row up to date at different times."""
    generator = torch.Generator().manual_seed(2)
    start, gradient = (torch.randn(_ROWS, _WIDTH, generator=generator) for _ in range(2))
    codes = []
    for interval in (1, 20):
        moments, rows = compact(kind, start.clone(), None), AdamRows(_ROWS, start.device)
        for number in range(1, 41):
            rows.touched.fill_(number == 1)
            rows.step(moments, gradient, _step(number))
            if number % interval == 0:
                rows.catch_up(moments)
        codes.append(moments)
    often, seldom = codes
    assert relative_error(often.mean.codes.double(), seldom.mean.codes.double()) <= 1e-5
    assert relative_error(often.values, seldom.values) <= 1e-6
    assert float(often.mean.codes.float().abs().max()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_expanded_packs_to_the_same(kind):
    generator = torch.Generator().manual_seed(3)
    moments = compact(kind, torch.zeros(8, 16), None)
    pack(moments, torch.randn(8, 16, generator=generator), torch.rand(8, 16, generator=generator))
    again = compact(kind, torch.zeros(8, 16), None)
    pack(again, *expand(moments))
    assert relative_error(again.mean.codes.double(), moments.mean.codes.double()) <= 1e-6
    assert relative_error(again.square, moments.square) <= 1e-6


def test_rows_of_nothing_are_zero():
    coded = CodedRows((2, 4), torch.int8, torch.device("cpu"))
    coded.write(torch.arange(2), torch.tensor([[0.0] * 4, [1e-40, 0, 0, 0]]))
    assert not coded.read(torch.arange(2)).any()


def test_the_flag_names_every_kind():
    from ultramem_megatron.kernels.adam_rows.compact import KINDS
    from ultramem_megatron.memory.validation import CHOICES

    assert CHOICES["table_moments"] == ("float32", *KINDS)
