"""Tables in 8 bits where no GPU reads them: decoded in registers, or each row once beforehand."""

import pytest
import torch

from tests.kernels.compiler import NATIVE, needs_compiler
from tests.kernels.lookup_cases import Sizes, inputs
from tests.kernels.quantized_cases import (
    CASES,
    PREVALUED,
    assert_lookup_equals_reference,
    assert_prevalued_equals_reference,
)
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.kernels.lookup_reduce import lookup_quantized, lookup_reduce
from ultramem_megatron.kernels.quantized import FORMATS, QuantizedRows, quantized


@pytest.fixture(autouse=True, params=["torch", NATIVE])
def _implementation(request, monkeypatch):
    monkeypatch.setenv("ULTRAMEM_KERNELS", request.param)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("sizes", "block"), CASES, ids=str)
def test_equals_the_reference_of_the_decoded_values(sizes, block, kind):
    for dtype in (torch.float32, torch.bfloat16):
        assert_lookup_equals_reference(sizes, block, kind, dtype)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("sizes", "block", "pre_block"), PREVALUED, ids=str)
def test_behind_pre_values(sizes, block, pre_block, kind):
    for dtype in (torch.float32, torch.bfloat16):
        assert_prevalued_equals_reference(sizes, (block, pre_block), kind, "silu", dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("sizes", "block"), CASES, ids=str)
def test_every_bit_is_that_of_decoded_values(sizes, block, kind, dtype, monkeypatch):
    monkeypatch.setenv("ULTRAMEM_KERNELS", "native")
    case = inputs(sizes, torch.float32)
    table = quantized(case.table.detach(), kind, block)
    picked = (case.rows, case.groups, case.scores.detach())
    wanted = lookup_reduce(table.values().to(dtype), *picked, sizes.groups)
    assert torch.equal(lookup_quantized(table, *picked, sizes.groups, dtype), wanted)


@needs_compiler
@pytest.mark.parametrize("kind", FORMATS)
def test_every_code_is_read(kind, monkeypatch):
    """In native code: a table whose rows are the codes, NaN of fp8 apart."""
    monkeypatch.setenv("ULTRAMEM_KERNELS", "native")
    codes = torch.arange(256, dtype=torch.uint8).view(FORMATS[kind]).unsqueeze(1)
    table = QuantizedRows(codes, torch.ones(256, 1))
    rows = torch.arange(256).unsqueeze(1)
    picked = (rows, torch.zeros_like(rows), torch.ones(256, 1, 1))
    found = lookup_quantized(table, *picked, 1, torch.float32).flatten()
    wanted = codes.float().flatten()
    known = ~wanted.isnan()
    assert int(known.sum()) == (254 if kind == "fp8" else 256)
    assert torch.equal(found[known], wanted[known])


@needs_compiler
@pytest.mark.parametrize(("where", "index"), [("rows", 7), ("groups", -1)])
def test_an_index_that_is_not_there_is_no_address(where, index, monkeypatch):
    monkeypatch.setenv("ULTRAMEM_KERNELS", "native")
    case = inputs(Sizes(4, 3, 2, 5, 7, rows=7), torch.float32)
    getattr(case, where)[1, 2] = index
    table = quantized(case.table.detach(), "int8")
    with pytest.raises(IndexError, match=f" {index} of 7"):
        lookup_quantized(table, *case[1:3], case.scores.detach(), 7, torch.float32)


def test_what_is_not_finite_has_no_codes():
    with pytest.raises(UltraMemError, match="NaN or infinity"):
        quantized(torch.tensor([[1.0, float("inf")]]), "int8")
