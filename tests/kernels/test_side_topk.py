"""Side top-m: its worked case, every implementation against float64, ties, extremes, memory.

Letters as in kernels/side_topk/reference.py.
"""

import os

import pytest
import torch

from tests.closeness import assert_close, assert_rounds_no_worse, relative_error, rounding
from tests.kernels.compiler import NATIVE
from ultramem_megatron.kernels import precision
from ultramem_megatron.kernels.side_topk import (
    kept_keys,
    native_path,
    side_topk,
    side_topk_reference,
)
from ultramem_megatron.kernels.side_topk.eager import EagerSideTopk

# tokens, heads, keys per side, ranks, width of a rank's key, m
SIZES = [
    (5, 2, 40, 2, 3, 7),
    (1, 1, 9, 1, 4, 1),
    (0, 2, 12, 2, 3, 4),
    (3, 1, 33, 3, 2, 33),
    (2, 3, 131, 2, 5, 8),
    (2, 1, 20, 2, 3, 18),
]


IN_CHUNKS = pytest.param("native in chunks", marks=NATIVE.marks)
TRITON = ["triton"] if os.environ.get("TRITON_INTERPRET") else []


@pytest.fixture(params=["reference", "torch", NATIVE, IN_CHUNKS, *TRITON])
def forced(request, monkeypatch):
    """Each implementation in turn; the native one as for few tokens, and as for many."""
    name = request.param.split()[0]
    monkeypatch.setenv("ULTRAMEM_KERNELS", name)
    if request.param != name:
        monkeypatch.setattr(native_path, "FEW_TOKENS", 0)
        monkeypatch.setattr(native_path, "CACHED_BYTES", 1500)  # a few tokens' scores
    return name


def _case(sizes, dtype=torch.float64, integers=False):
    tokens, heads, keys, ranks, width, topk = sizes
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn.round().clamp(-2, 2) if integers else drawn

    query, key_set = draw(tokens, heads, 2, ranks, width), draw(heads, 2, keys, ranks, width)
    directions = draw(2, heads, ranks).float()
    inputs = query.to(dtype).requires_grad_(), key_set.to(dtype).requires_grad_()
    return *inputs, directions, topk


def _run(function, case):
    """Indices, scores and the gradients of query and keys for some gradient of the scores."""
    indices, scores = function(*case)
    generator = torch.Generator().manual_seed(4)
    grad = torch.randn(scores.shape, generator=generator, dtype=torch.float64)
    return indices, scores, *torch.autograd.grad(scores, case[:2], grad.to(scores.dtype))


def test_worked_case(forced):
    keys = torch.tensor([1.0, 5.0, 5.0, 3.0]).view(1, 1, 4, 1, 1).expand(1, 2, 4, 1, 1)
    query = torch.tensor([2.0, -1.0]).view(1, 1, 2, 1, 1)
    indices, scores = side_topk(query, keys, torch.ones(2, 1, 1), 2)
    assert indices.view(2, 2).tolist() == [[1, 2], [0, 3]]
    assert scores.view(2, 2).tolist() == [[10, 10], [-1, -3]]


@pytest.mark.parametrize("sizes", SIZES)
def test_small_integers_with_many_ties_give_the_same_keys(forced, sizes, nan_filled_empty):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = _run(side_topk, _case(sizes, dtype, integers=True))
        wanted = _run(side_topk_reference, _case(sizes, integers=True))
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1].double(), wanted[1])
        assert (found[0].diff(dim=-1) > 0).all()


@pytest.mark.parametrize(
    ("keys", "ranks", "topk"), [(131, 2, 8), (123, 2, 8), (41, 2, 4), (41, 1, 4), (41, 2, 5)]
)
def test_what_stands_behind_the_last_key_takes_nobodys_place(forced, keys, ranks, topk):
    """All scores are below zero, those of the zeros that fill up a chunk are not."""
    case = _case((2, 2, keys, ranks, 3, topk), torch.float32)
    query, key_set, directions = (-case[0].abs(), case[1].abs(), case[2].abs())
    found = side_topk(query, key_set, directions, topk)
    wanted = side_topk_reference(query, key_set, directions, topk)
    assert torch.equal(found[0], wanted[0])


@pytest.mark.parametrize(
    ("num_keys", "topk", "chosen"),
    [(3578, 42, 43), (1056, 128, 128), (42, 42, 42), (41, 5, 6), (9, 1, 1)],
)
def test_the_scratch_space_holds_the_chunks_that_are_chosen(num_keys, topk, chosen):
    """As int32 where the indices come, int64."""
    pytest.importorskip("triton", reason="Triton is for Linux")
    from ultramem_megatron.kernels.side_topk.fused import select_sizes

    sizes = select_sizes(num_keys, topk, 1)
    assert sizes["CHOSEN"] == chosen <= 2 * topk
    assert sizes["CHOSEN"] * sizes["CHUNK"] <= sizes["CANDIDATES"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_error_is_within_twice_that_of_plain_torch(forced, dtype, nan_filled_empty):
    """All keys are picked, so that rounding cannot change which ones."""
    for sizes in ((5, 2, 40, 2, 3, 40), (1, 1, 131, 4, 5, 131)):
        exact = _run(side_topk_reference, _case(sizes))
        plain = _run(side_topk_reference, _case(sizes, dtype))
        found = _run(side_topk, _case(sizes, dtype))
        for name, out, rounded, truth in zip(
            ("scores", "query", "keys"), found[1:], plain[1:], exact[1:], strict=True
        ):
            floor = rounding(torch.promote_types(dtype, torch.float32), sizes[4])
            assert_rounds_no_worse(out, rounded, truth, floor, name)


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_on_cpus_with_instructions_for_it_and_without(native, monkeypatch):
    """All keys are picked. Products of bfloat16 are rounded to it or kept in float32."""
    monkeypatch.setattr(precision, "_cpu_multiplies_bfloat16", lambda: native)
    sizes = (5, 2, 40, 2, 3, 40)
    query, keys, *rest = _case(sizes, torch.bfloat16)
    found = _run(EagerSideTopk.apply, (query, keys, *rest))
    exact = query.detach().double().requires_grad_(), keys.detach().double().requires_grad_()
    wanted = _run(side_topk_reference, (*exact, *rest))
    assert found[1].dtype == torch.float32
    error = relative_error(found[1].double(), wanted[1])
    in_float32 = rounding(torch.float32, sizes[4])
    assert (error > in_float32) == native
    once = torch.finfo(torch.bfloat16).eps / 2
    assert error < once
    for out, truth in zip(found[2:], wanted[2:], strict=True):
        assert_close(out.double(), truth, once + in_float32)


@pytest.mark.parametrize("sizes", SIZES)
def test_picks_and_gradients_equal_the_reference_in_float64(forced, sizes):
    found, wanted = _run(side_topk, _case(sizes)), _run(side_topk_reference, _case(sizes))
    assert torch.equal(found[0], wanted[0])
    for out, truth in zip(found[1:], wanted[1:], strict=True):
        # A key's gradient adds up tokens, a query's the keys, a score the width.
        assert_close(out, truth, rounding(torch.float64, max(*sizes[:1], *sizes[4:])))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_keys_kept_for_many_calls_give_the_same(forced, dtype):
    query, keys, directions, topk = _case((3, 2, 40, 2, 3, 7), dtype)
    below = keys.detach().neg().exp().neg()  # all below a row of zeros
    expected = side_topk(query.exp(), below, directions.exp(), topk)
    found = side_topk(query.exp(), kept_keys(below, 2), directions.exp(), topk, 40)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("shared", ["nothing", "heads", "ranks", "both"])
@pytest.mark.parametrize(
    "sizes", [(3, 4, 40, 2, 3, 7), (1, 3, 70, 1, 4, 5), (0, 2, 20, 2, 3, 4), (2, 3, 64, 3, 8, 6)]
)
def test_whoever_of_heads_and_ranks_reads_the_same_query(forced, sizes, shared, nan_filled_empty):
    """With a graph, and as decoding calls it, of keys that are kept."""
    query, keys, directions, topk = _case(sizes, torch.float32)
    heads, ranks = sizes[1], sizes[3]
    if shared in ("heads", "both"):  # a query for two heads, the last may have one alone
        query = query[:, ::2]
    if shared in ("ranks", "both"):
        query = query[:, :, :, :1]
    query = query.detach().clone().requires_grad_()
    exact = query.detach().double().requires_grad_(), keys.detach().double().requires_grad_()

    def plain(query, keys, *rest):
        each = query.repeat_interleave(2 if query.shape[1] < heads else 1, 1)[:, :heads]
        return side_topk_reference(each.expand(-1, -1, -1, ranks, -1), keys, *rest)

    found, wanted = (
        _run(side_topk, (query, keys, directions, topk)),
        _run(plain, (*exact, directions, topk)),
    )
    assert torch.equal(found[0], wanted[0])
    for out, truth in zip(found[1:], wanted[1:], strict=True):
        terms = max(sizes[0], 2 * topk * ranks, sizes[4])
        assert_close(out.double(), truth, rounding(torch.float32, terms))
    kept = kept_keys(keys.detach(), query.shape[1])
    with torch.no_grad():
        indices, scores = side_topk(query, kept, directions, topk, sizes[2])
    assert torch.equal(indices, wanted[0])
    assert_close(scores.double(), wanted[1].detach(), rounding(torch.float32, sizes[4]))


@pytest.mark.parametrize("function", [side_topk_reference, EagerSideTopk.apply])
def test_gradcheck(function):
    query, keys, directions, topk = _case((2, 2, 9, 2, 2, 3))
    assert torch.autograd.gradcheck(lambda q, k: function(q, k, directions, topk)[1], (query, keys))


def test_one_query_may_serve_all_heads_without_a_copy(forced):
    query, keys, directions, topk = _case((3, 2, 20, 2, 3, 4))
    shared = query[:, :1].detach().clone().requires_grad_()
    expanded = shared.expand(-1, 2, -1, -1, -1)
    _, scores = side_topk(expanded, keys, directions, topk)
    _, wanted = side_topk(expanded.detach().clone(), keys, directions, topk)
    assert torch.equal(scores, wanted)
    scores.sum().backward()
    assert shared.grad.norm() > 0


def test_extremes(forced):
    """All equal: the first keys. NaN is above all, minus infinity below, and neither is lost."""
    _, keys, directions, topk = _case((1, 1, 50, 1, 1, 4), torch.float32)
    query, ones = torch.ones(1, 1, 2, 1, 1), torch.ones_like(directions)
    with torch.no_grad():
        assert side_topk(query, torch.ones_like(keys), ones, topk)[0][0, 0, 0].tolist() == [
            0,
            1,
            2,
            3,
        ]
        keys.fill_(float("-inf"))
        keys[:, :, [7, 30]] = torch.tensor([float("nan"), 5.0]).view(2, 1, 1)
        indices, scores = side_topk(query, keys, ones, topk)
    assert indices[0, 0, 0].tolist() == [0, 1, 7, 30]
    assert scores[0, 0, 0, 0, 0] == float("-inf")
    assert scores[0, 0, 0, 0, 2].isnan()
    assert scores[0, 0, 0, 0, 3] == 5


def test_selections_of_random_scores_differ_by_near_ties_only(forced):
    sizes = (6, 2, 300, 2, 16, 12)
    for dtype in (torch.float32, torch.bfloat16):
        query, keys, directions, topk = _case(sizes, dtype)
        indices, _ = side_topk(query, keys, directions, topk)
        every = torch.einsum(
            "thsak,hsnak,sha->thsn", query.double(), keys.double(), directions.double()
        )
        lowest = every.gather(-1, indices).min(-1).values
        threshold = every.topk(topk).values[..., -1]
        assert ((threshold - lowest) <= 8 * torch.finfo(dtype).eps * every.abs().amax(-1)).all()


def test_no_tensor_of_all_scores_is_held(monkeypatch):
    """Allocations of the forward and backward stay far below tokens x keys."""
    monkeypatch.setenv("ULTRAMEM_KERNELS", "torch")
    tokens = 512 * torch.get_num_threads()  # each thread has a buffer
    case = _case((tokens, 1, 2048, 1, 8, 4), torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        _run(side_topk, case)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < tokens * 2048 * 4 / 2  # bytes
