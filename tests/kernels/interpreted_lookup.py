"""Lookup-reduce in Triton's interpreter; test_lookup_triton.py runs this in a process of its own.

Whether Triton interprets is decided when it is first imported.
"""

import pytest
import torch

from tests.closeness import assert_close
from tests.kernels import dot_cases
from tests.kernels.lookup_cases import (
    ODD_SIZES,
    Sizes,
    assert_equals_reference,
    assert_rounds_like_reference,
    exact_rounding,
    inputs,
    lazy_zeros,
    main_grad_rounding,
    results,
)
from tests.kernels.quantized_cases import CASES, assert_lookup_equals_reference
from ultramem_megatron.communication.pausing import run
from ultramem_megatron.kernels.lookup_reduce import (
    lookup_addresses,
    lookup_quantized,
    lookup_reduce,
    lookup_reduce_reference,
    triton_backward,
    triton_forward,
)
from ultramem_megatron.kernels.quantized import FORMATS, QuantizedRows, quantized
from ultramem_megatron.memory.tables.stored import HostTable, StoredReader


@pytest.fixture(params=["atomics", "deterministic"], autouse=True)
def order_of_sums(request):
    torch.use_deterministic_algorithms(request.param == "deterministic")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "sizes", [s for s in ODD_SIZES if s.tokens < 6] + [Sizes(1, 9, 1, 300, 3)], ids=str
)
@pytest.mark.parametrize("few_programs", [0, triton_forward.FEW_PROGRAMS], ids=["many", "few"])
@pytest.mark.usefixtures("nan_filled_empty")
def test_equals_the_reference(sizes, few_programs, monkeypatch):
    monkeypatch.setattr(triton_forward, "FEW_PROGRAMS", few_programs)
    if few_programs == 0:
        monkeypatch.setattr(triton_backward, "MANY_PROGRAMS", 0)
    assert_equals_reference(lookup_reduce, sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("graph", [False, True])
def test_addresses_are_taken_apart(dtype, graph):
    case = inputs(Sizes(3, 9, 2, 40, 4), dtype)
    wanted = lookup_reduce(case.table, case.rows, case.groups, case.scores, 4)
    addresses = case.groups * len(case.table) + case.rows
    with torch.set_grad_enabled(graph):
        found = lookup_addresses(case.table, addresses, case.scores, 4)
    assert torch.equal(found, wanted)
    assert found.requires_grad == graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", dot_cases.SIZES, ids=str)
def test_the_transposed_lookup_equals_its_reference(sizes, dtype):
    dot_cases.assert_equals_reference(sizes, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(4, 20, 2, 8, 4),
        Sizes(2, 70, 1, 192, 4),  # three blocks of columns, two of picks
        Sizes(1, 40, 2, 130, 9),
        Sizes(2, 9, 1, 24, 40),
    ],
    ids=str,
)
def test_rounding_is_no_worse_than_the_references(sizes, dtype):
    assert_rounds_like_reference(lookup_reduce, sizes, dtype)


@pytest.mark.parametrize(
    ("dtype", "units"),
    [(torch.float16, 0.5), (torch.bfloat16, 1)],  # the interpreter cuts bfloat16 off
    ids=str,
)
def test_scores_keep_their_precision_beside_a_table_of_less(dtype, units):
    sizes = Sizes(3, 4, 2, 40, 4)
    case = inputs(sizes, dtype)
    apart = torch.arange(4).expand(3, 4)  # a pick a group: nothing averages out
    scores = torch.rand(3, 4, 2) + 1
    exact = lookup_reduce_reference(case.table.double(), case.rows, apart, scores.double(), 4)
    found = lookup_reduce(case.table.detach(), case.rows, apart, scores, 4).double()
    error = ((found - exact) / exact).abs().max().item()
    assert error <= 1.01 * units * torch.finfo(dtype).eps  # of the output's rounding alone


def test_scores_that_float16_cannot_hold():
    table = torch.full((1, 16), 0.25, dtype=torch.float16)
    scores = torch.tensor([1e5, -1e5, 65519.0, 2e5, float("nan")]).view(1, 5, 1)
    rows, apart = torch.zeros(1, 5, dtype=torch.int64), torch.arange(5).unsqueeze(0)
    found = lookup_reduce(table, rows, apart, scores, 5)[0, :, 0]
    assert torch.equal(found[:3], (scores[0, :3, 0] / 4).half())
    assert found[3] == float("inf")
    assert found[4].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_micro_batches_add_up_in_main_grad(dtype):
    sizes = Sizes(6, 9, 2, 8, 4)
    case = inputs(sizes, torch.bfloat16)
    exact = results(lookup_reduce_reference, inputs(sizes))
    case.table.main_grad = torch.zeros_like(case.table, dtype=dtype)
    for _ in range(2):
        lookup_reduce(*case[:5]).backward(case.grad)
        assert case.table.grad._nnz() == 0
        case.table.grad = None
    assert_close(case.table.main_grad.double(), 2 * exact[1], main_grad_rounding(dtype, sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_main_grad_that_is_no_block_of_memory(dtype):
    """Its neighbours stay as they are."""
    sizes = Sizes(6, 9, 2, 8, 4)
    case, exact = inputs(sizes, torch.float32), results(lookup_reduce_reference, inputs(sizes))
    around = torch.zeros(sizes.rows, 32, dtype=dtype)
    case.table.main_grad = around[:, ::2]
    lookup_reduce(*case[:5]).backward(case.grad)
    assert_close(case.table.main_grad.double(), exact[1], main_grad_rounding(dtype, sizes))
    assert not around[:, 1::2].any()


def test_a_table_of_more_numbers_than_32_bits_count():
    rows, width = 2**21 + 3, 1032
    assert rows * width > 2**31
    table = lazy_zeros(rows, width, torch.float16)
    table[-1], table[-2] = 2, 3
    table.requires_grad_().main_grad = lazy_zeros(rows, width, torch.bfloat16)
    scores = torch.tensor([[[1.0, 10.0], [1.0, 1.0]]], requires_grad=True)
    picks, groups = torch.tensor([[rows - 1, rows - 2]]), torch.tensor([[0, 0]])
    out = lookup_reduce(table, picks, groups, scores, 1)
    assert out[0, 0, [0, -1]].tolist() == [5, 23]
    with torch.no_grad():
        assert torch.equal(lookup_addresses(table, picks, scores, 1), out)
    out.sum().backward()
    assert table.main_grad[-1, [0, -1]].tolist() == [1, 10]
    assert scores.grad.tolist() == [[[1032, 1032], [1548, 1548]]]


def test_scores_only():
    sizes = Sizes(3, 4, 2, 2, 4)
    case = inputs(sizes)
    fixed = case.table.detach()
    lookup_reduce(fixed, *case[1:5]).backward(case.grad)
    assert_close(case.scores.grad, results(lookup_reduce_reference, case)[2], exact_rounding(sizes))


@pytest.mark.parametrize("kind", [None, *FORMATS])
def test_a_table_in_host_memory_is_read_where_it_lies(kind):
    """None of its rows is fetched, and what is read is what the kernels read of a GPU's table."""
    case = inputs(Sizes(3, 9, 2, 40, 4), torch.float32)
    addresses = case.groups * len(case.table) + case.rows
    values = case.table.detach()
    values = values if kind is None else quantized(values, kind, 8)
    reader = StoredReader(_NeverFetched(values), len(case.table), case.num_groups)
    with torch.no_grad():
        found = run(reader.read(case.table[:0], addresses, case.scores))
        if kind is None:
            assert torch.equal(found, lookup_reduce(*case[:5]))
        else:
            expected = lookup_reduce_reference(values.values(), *case[1:5])
            assert_close(found, expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("sizes", "block"), CASES, ids=str)
@pytest.mark.usefixtures("nan_filled_empty")
def test_codes_are_decoded_where_they_are_read(sizes, block, kind, dtype):
    assert_lookup_equals_reference(sizes, block, kind, dtype)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_code_is_decoded_exactly(kind):
    """One value a row, read once with a score of 1; NaN of e4m3 is no code that is written."""
    codes = torch.arange(256, dtype=torch.uint8).view(256, 1).view(FORMATS[kind])
    table = QuantizedRows(codes, torch.ones(256, 1))
    rows, groups = torch.arange(256).view(8, 32), torch.arange(32).expand(8, 32)
    one = torch.ones(8, 32, 1)
    found = lookup_quantized(table, rows, groups, one, 32, torch.float32).view(256)
    expected = codes.float().view(256)
    kept = expected.isfinite()
    assert kept.sum() >= 254
    assert torch.equal(found[kept], expected[kept])


class _NeverFetched(HostTable):
    def fetch(self, rows, width):
        raise AssertionError
