"""Lookups of tables in 8 bits, against the references of what their codes stand for."""

import torch

from tests.closeness import assert_close, rounding
from tests.kernels import lookup_cases, prevalued_cases
from ultramem_megatron.kernels.lookup_prevalued import (
    lookup_prevalued_quantized,
    lookup_prevalued_reference,
)
from ultramem_megatron.kernels.lookup_reduce import lookup_quantized, lookup_reduce_reference
from ultramem_megatron.kernels.quantized import quantized

# With how many values a scale: whole rows, cores' slices, and less that divides neither well.
CASES = [
    (lookup_cases.Sizes(3, 9, 2, 40, 4), None),
    (lookup_cases.Sizes(2, 70, 2, 192, 4), 64),
    (lookup_cases.Sizes(4, 5, 3, 10, 9), 6),
    (lookup_cases.Sizes(1, 17, 1, 33, 16, rows=1000), 11),
    (lookup_cases.Sizes(2, 3, 2, 8, 90), 4),
    (lookup_cases.Sizes(0, 3, 2, 2, 4), None),
    (lookup_cases.Sizes(1, 1, 1, 1, 1, rows=1), 1),
]


def assert_lookup_equals_reference(
    sizes: lookup_cases.Sizes, block: int | None, kind: str, dtype: torch.dtype
) -> None:
    """In float64 from the decoded values; `block`: values with a scale in common."""
    case = lookup_cases.inputs(sizes, torch.float32)
    table = quantized(case.table.detach(), kind, block)
    exact = table.values().double()
    if len(exact):
        assert len(exact.unique()) > 1 or exact.numel() == 1
    picked = (case.rows, case.groups, case.scores.detach())
    wanted = lookup_reduce_reference(exact, *picked[:2], picked[2].double(), sizes.groups)
    found = lookup_quantized(table, *picked, sizes.groups, dtype)
    assert found.dtype == dtype
    # Rounded when written; scores in two parts of eight bits on tensor cores, or to the dtype.
    assert_close(found.double(), wanted, 2 * rounding(dtype, sizes.picks), f"{sizes}, {kind}")


# With how many values and pre-values a scale.
PREVALUED = [
    (prevalued_cases.Sizes(3, 9, 2, 20, 24, 4), None, None),
    (prevalued_cases.Sizes(2, 17, 2, 64, 70, 1), 32, 7),
    (prevalued_cases.Sizes(2, 5, 3, 10, 33, 9, rows=1000), 6, 33),
    (prevalued_cases.Sizes(0, 3, 2, 2, 4, 4), None, None),
]


def assert_prevalued_equals_reference(
    sizes: prevalued_cases.Sizes,
    blocks: tuple[int | None, int | None],
    kind: str,
    act: str,
    dtype: torch.dtype,
) -> None:
    """As assert_lookup_equals_reference; blocks: of values and of pre-values."""
    case = prevalued_cases.inputs(sizes, torch.float32)
    table, before = (
        quantized(values.detach(), kind, block)
        for values, block in zip((case.table, case.pre_table), blocks, strict=True)
    )
    picked = (case.rows, case.groups, case.scores.detach(), case.x.detach())
    exact = (table.values().double(), before.values().double())
    doubles = (*picked[:2], picked[2].double(), picked[3].double())
    wanted = lookup_prevalued_reference(*exact, *doubles, sizes.groups, act)
    found = lookup_prevalued_quantized(table, before, *picked, sizes.groups, act, dtype)
    assert found.dtype == dtype
    tolerance = 2 * rounding(dtype, prevalued_cases.terms(sizes))
    assert_close(found.double(), wanted, tolerance, f"{sizes}, {kind}, {act}")
