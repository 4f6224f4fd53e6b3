"""Tables in 8 bits where no GPU reads them: decoded rows, each once, through the other kernels."""

import pytest
import torch

from tests.kernels.quantized_cases import (
    CASES,
    PREVALUED,
    assert_lookup_equals_reference,
    assert_prevalued_equals_reference,
)
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.kernels.quantized import FORMATS, quantized


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


def test_what_is_not_finite_has_no_codes():
    with pytest.raises(UltraMemError, match="NaN or infinity"):
        quantized(torch.tensor([[1.0, float("inf")]]), "int8")
