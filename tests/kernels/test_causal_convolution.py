"""Causal convolution: its worked case, every implementation against float64, pieces, documents.

Letters as in kernels/causal_convolution/reference.py.
"""

import os

import pytest
import torch

from tests.closeness import assert_close, rounding
from tests.kernels.compiler import NATIVE, needs_compiler
from ultramem_megatron.kernels.causal_convolution import (
    causal_convolution,
    causal_convolution_reference,
    causal_convolution_step,
)

# positions, sequences, channels, taps, pieces, documents
SIZES = [
    (9, 2, 3, 4, 1, False),
    (1, 1, 1, 1, 1, False),
    (0, 2, 3, 2, 1, False),
    (12, 3, 5, 3, 2, True),
    (2, 1, 6, 5, 1, True),  # shorter than the taps reach
    (34, 2, 300, 5, 1, True),  # several parts of rows, two blocks of channels
    (40, 2, 17, 6, 2, False),
    (3, 2, 4, 3, 3, False),  # decoding: a position a piece
]
TRITON = ["triton"] if os.environ.get("TRITON_INTERPRET") else []


@pytest.fixture(params=["reference", "torch", NATIVE, *TRITON])
def forced(request, monkeypatch):
    """Each implementation in turn."""
    monkeypatch.setenv("ULTRAMEM_KERNELS", request.param)
    return request.param


def _case(sizes, dtype=torch.float64, with_history=True):
    """x, weight, history, reach."""
    positions, sequences, channels, taps, pieces, documents = sizes
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        drawn = torch.randn(shape, generator=generator).bfloat16()
        return drawn.to(dtype).requires_grad_()

    x, weight = draw(positions, sequences, channels), draw(channels, taps)
    history = draw(pieces, taps - 1, sequences, channels) if with_history else None
    reach = None
    if documents:
        reach = torch.randint(taps + 2, (positions, sequences), generator=generator)
    return x, weight, history, reach


def _run(function, case):
    """The output and the gradients of x, weight and history for some gradient of the output."""
    out = function(*case)
    generator = torch.Generator().manual_seed(4)
    grad = torch.randn(out.shape, generator=generator).bfloat16().to(out)
    leaves = [leaf for leaf in case[:3] if leaf is not None]
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def test_worked_case(forced):
    x = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    weight = torch.tensor([[10.0, 1.0]])
    assert causal_convolution(x, weight).flatten().tolist() == [1, 12, 23]
    reach = torch.tensor([0, 0, 1]).view(3, 1)
    assert causal_convolution(x, weight, reach=reach).flatten().tolist() == [1, 2, 23]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("with_history", [True, False])
def test_output_and_gradients_equal_the_reference_in_float64(
    forced, sizes, with_history, nan_filled_empty
):
    if not with_history:
        sizes = (*sizes[:4], 1, sizes[5])
    found = _run(causal_convolution, _case(sizes, with_history=with_history))
    wanted = _run(causal_convolution_reference, _case(sizes, with_history=with_history))
    for out, truth in zip(found, wanted, strict=True):
        assert_close(out, truth, rounding(torch.float64, max(sizes[3], sizes[0] * sizes[1])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_rounded_once(forced, dtype):
    """To the nearest number, or in Triton's interpreter to the one below."""
    sizes = (34, 2, 40, 5, 2, True)
    exact = _run(causal_convolution_reference, _case(sizes))
    found = _run(causal_convolution, _case(sizes, dtype))
    for name, out, truth in zip(("output", "x", "weight", "history"), found, exact, strict=True):
        assert out.dtype == dtype
        once = torch.finfo(dtype).eps * (0.5 if forced != "triton" else 1)
        assert_close(out.double(), truth, once + rounding(torch.float32, 140), name)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("with_history", [True, False])
def test_native_kernels_sum_in_float32(sizes, with_history, dtype, monkeypatch, nan_filled_empty):
    """The sizes above again: in float64 PyTorch's own compute."""
    if not with_history:
        sizes = (*sizes[:4], 1, sizes[5])
    monkeypatch.setenv("ULTRAMEM_KERNELS", "native")
    found = _run(causal_convolution, _case(sizes, dtype, with_history))
    exact = _run(causal_convolution_reference, _case(sizes, with_history=with_history))
    bound = torch.finfo(dtype).eps / 2 + rounding(torch.float32, max(sizes[3], sizes[0] * sizes[1]))
    for out, truth in zip(found, exact, strict=True):
        assert_close(out.double(), truth, bound)


def test_a_document_sees_nothing_of_the_one_before(forced):
    """Not even what is not a number."""
    x, weight, _, _ = _case((6, 1, 3, 4, 1, False), torch.float32, with_history=False)
    reach = torch.tensor([0, 1, 2, 0, 1, 2]).view(6, 1)
    own = causal_convolution(x[3:], weight)
    broken = x.detach().clone()
    broken[:3] = float("nan")
    assert torch.equal(causal_convolution(broken, weight, reach=reach)[3:], own)


def test_worked_step(forced):
    history, weight = torch.tensor([1.0, 2.0]).view(2, 1, 1), torch.tensor([[100.0, 10.0, 1.0]])
    with torch.no_grad():
        assert causal_convolution_step(torch.full((1, 1, 1), 3.0), weight, history).item() == 123
    assert history.flatten().tolist() == [2, 3]


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize(
    ("sequences", "channels", "taps"), [(1, 3, 1), (5, 300, 5), (3, 17, 2), (0, 4, 3)]
)
def test_steps_equal_the_whole(forced, sequences, channels, taps, graph):
    x, weight, history, _ = _case((7, sequences, channels, taps, 1, False))
    whole = causal_convolution_reference(x, weight, history)
    kept = history.detach()[0].clone()
    with torch.set_grad_enabled(graph):
        steps = torch.cat([causal_convolution_step(one, weight, kept) for one in x.split(1)])
    assert_close(steps, whole, rounding(torch.float64, taps))
    last = torch.cat([history[0], x])[7:]
    assert torch.equal(kept, last)
    if graph:
        found, wanted = (torch.autograd.grad(out.sum(), weight)[0] for out in (steps, whole))
        assert_close(found, wanted, rounding(torch.float64, 7 * sequences + 1))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("sequences", "channels", "taps"), [(1, 3, 1), (5, 300, 5), (3, 17, 2), (0, 4, 3)]
)
def test_native_steps_equal_the_whole(sequences, channels, taps, dtype, monkeypatch):
    monkeypatch.setenv("ULTRAMEM_KERNELS", "native")
    x, weight, history, _ = _case((7, sequences, channels, taps, 1, False), dtype)
    kept = history.detach()[0].clone()
    with torch.no_grad():
        steps = torch.cat([causal_convolution_step(one, weight, kept) for one in x.split(1)])
        assert torch.equal(steps, causal_convolution(x, weight, history))
    assert torch.equal(kept, torch.cat([history[0], x])[7:])
