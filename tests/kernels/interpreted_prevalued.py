"""The lookup behind pre-values in Triton's interpreter; test_prevalued_triton.py runs it.

Whether Triton interprets is decided when it is first imported, so this has a process of its own.
"""

import pytest
import torch

from tests.closeness import assert_close, rounding
from tests.kernels.prevalued_cases import (
    SIZES,
    Sizes,
    assert_equals_reference,
    inputs,
    results,
    terms,
)
from tests.kernels.quantized_cases import PREVALUED, assert_prevalued_equals_reference
from ultramem_megatron.communication.pausing import run
from ultramem_megatron.kernels.lookup_prevalued import (
    lookup_prevalued,
    lookup_prevalued_reference,
    triton_path,
)
from ultramem_megatron.kernels.quantized import FORMATS, quantized
from ultramem_megatron.memory.tables.contract import PreValues
from ultramem_megatron.memory.tables.stored import HostTable, QuantizedHostTable, StoredReader


@pytest.fixture(params=["atomics", "deterministic"], autouse=True)
def order_of_sums(request):
    torch.use_deterministic_algorithms(request.param == "deterministic")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("sizes", [*SIZES, Sizes(1, 6, 1, 300, 90, 3)], ids=str)
@pytest.mark.parametrize("few_programs", [0, triton_path.FEW_PROGRAMS], ids=["many", "few"])
@pytest.mark.usefixtures("nan_filled_empty")
def test_equals_the_reference(sizes, few_programs, monkeypatch):
    monkeypatch.setattr(triton_path, "FEW_PROGRAMS", few_programs)
    assert_equals_reference(sizes, torch.float64, "none")


def test_tables_wider_than_a_program_holds(monkeypatch):
    """Columns are cut; the programs that repeat a token's other half write it once."""
    monkeypatch.setattr(triton_path, "MOST_COLUMNS", 32)
    for groups in (1, 4):
        assert_equals_reference(Sizes(2, 5, 2, 40, 70, groups), torch.float64, "gelu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    assert_equals_reference(Sizes(2, 9, 2, 20, 24, 4), dtype, "gelu")


@pytest.mark.parametrize("act", ["relu", "silu", "tanh"])
def test_activations(act):
    assert_equals_reference(Sizes(2, 5, 2, 4, 6, 1), torch.float32, act)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_micro_batches_add_up_in_main_grad(dtype):
    sizes = Sizes(2, 5, 2, 8, 12, 1, rows=3)
    case, exact = inputs(sizes, torch.bfloat16), results(lookup_prevalued_reference, inputs(sizes))
    for table in case[:2]:
        table.main_grad = torch.zeros_like(table, dtype=dtype)
    for _ in range(2):
        lookup_prevalued(*case[:7]).backward(case.grad)
        for table in case[:2]:
            assert table.grad._nnz() == 0
            table.grad = None
    for table, once in zip(case[:2], exact[1:3], strict=True):
        # The output's gradient and the inputs come in bfloat16 as they are; the interpreter cuts.
        assert_close(table.main_grad.double(), 2 * once, 2 * rounding(dtype, terms(sizes)))


@pytest.mark.parametrize("act", ["gelu", "softplus"])
@pytest.mark.parametrize("kind", [None, "int8"])
def test_tables_in_host_memory_are_read_where_they_lie(act, kind):
    """Unless PyTorch has to compute the activation between the two."""
    fetched = []

    class Counted(HostTable if kind is None else QuantizedHostTable):
        def fetch(self, rows, width):
            fetched.append(rows)
            return super().fetch(rows, width)

    case = inputs(Sizes(2, 9, 2, 20, 24, 4), torch.float32)
    tables = [table.detach() for table in case[:2]]
    if kind is not None:
        tables = [quantized(table, kind) for table in tables]
    values, before = map(Counted, tables)
    reader = StoredReader(values, len(case.table), case.num_groups)
    addresses = case.groups * len(case.table) + case.rows
    with torch.no_grad():
        pre = PreValues(case.pre_table[:0], case.x, act, before)
        found = run(reader.read(case.table[:0], addresses, case.scores, pre))
        decoded = tables if kind is None else [table.values() for table in tables]
        expected = lookup_prevalued(*decoded, *case[2:7], act)
    assert_close(found, expected, 1e-6)
    assert (not fetched) == (act == "gelu")


@pytest.mark.parametrize(("kind", "dtype"), [("int8", torch.bfloat16), ("fp8", torch.float32)])
@pytest.mark.parametrize(("sizes", "block", "pre_block"), PREVALUED, ids=str)
@pytest.mark.usefixtures("nan_filled_empty")
def test_codes_are_decoded_where_they_are_read(sizes, block, pre_block, kind, dtype):
    assert_prevalued_equals_reference(sizes, (block, pre_block), kind, "gelu", dtype)


@pytest.mark.parametrize("kind", FORMATS)
def test_codes_before_an_activation_of_pytorchs(kind):
    sizes, *blocks = PREVALUED[1]
    assert_prevalued_equals_reference(sizes, tuple(blocks), kind, "softplus", torch.float32)
