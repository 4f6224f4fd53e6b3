"""The query convolution on a sequence cut over ranks: results of the whole sequence."""

import itertools

import pytest
import torch

from tests.closeness import assert_close, rounding
from tests.ranks import init_gloo, run_on_ranks

_BATCH, _HIDDEN = 2, 3


def _whole(length, taps):
    generator = torch.Generator().manual_seed(length)
    x, grad = torch.randn(2, length, _BATCH, _HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(_HIDDEN, taps, generator=generator, dtype=torch.float64)
    return x, grad, weight


def _convolution(weight):
    from ultramem_megatron.memory.query import CausalConvolution

    convolution = CausalConvolution(*weight.shape).double()
    convolution.weight.data.copy_(weight)
    return convolution


def _own(sequence, tensor_group, context_group):
    from ultramem_megatron.communication.sequence_chunks import own_chunks

    chunks = own_chunks(sequence, context_group) if context_group.size() > 1 else sequence
    return chunks.chunk(tensor_group.size())[tensor_group.rank()]


def _on_rank(tp, cp, length, taps):
    from megatron.core import parallel_state

    from ultramem_megatron.megatron.layer.query_history import neighbours_history
    from ultramem_megatron.patches import registry

    registry.apply_all()
    init_gloo()
    parallel_state.initialize_model_parallel(tp, context_parallel_size=cp)
    tensor = parallel_state.get_tensor_model_parallel_group()
    context = parallel_state.get_context_parallel_group()
    x, grad, weight = _whole(length, taps)
    own = _own(x, tensor, context).clone().requires_grad_()
    out = _convolution(weight)(own, neighbours_history(own, taps, tensor, context))
    out.backward(_own(grad, tensor, context))
    return _own(torch.arange(length), tensor, context), out.detach(), own.grad


@pytest.mark.parametrize(
    ("tp", "cp", "length", "taps"),
    [
        (1, 2, 16, 4),
        (1, 3, 18, 2),
        (2, 2, 16, 3),
        (3, 1, 18, 5),
        (3, 2, 24, 3),  # the chunks of the middle share meet within it
        (2, 3, 12, 4),  # pieces of one token, a history over several
        (1, 4, 8, 6),
    ],
)
def test_like_the_whole_sequence(tp, cp, length, taps):
    x, grad, weight = _whole(length, taps)
    x.requires_grad_()
    expected = _convolution(weight)(x)
    expected.backward(grad)
    for positions, out, own_grad in run_on_ranks(tp * cp, _on_rank, tp, cp, length, taps):
        tolerance = rounding(torch.float64, taps)
        assert_close(out, expected.detach()[positions], tolerance)
        assert_close(own_grad, x.grad[positions], tolerance)


_ENDS = [0, 3, 4, 11, 16]  # of documents; one of a single token


def _causal_mask():
    """(1, 1, S, S), True where attention is forbidden: causal, and within documents."""
    document = torch.searchsorted(torch.tensor(_ENDS), torch.arange(_ENDS[-1]), right=True)
    return ((document[:, None] != document) | torch.ones(16, 16).triu(1).bool())[None, None]


def _documents_on_rank(tp, cp, taps):
    from types import SimpleNamespace

    from megatron.core import parallel_state

    from ultramem_megatron.communication.sequence_chunks import own_chunks
    from ultramem_megatron.megatron.layer.document_reach import masked_reach, packed_reach
    from ultramem_megatron.megatron.layer.query_history import neighbours_history
    from ultramem_megatron.patches import registry

    registry.apply_all()
    init_gloo()
    parallel_state.initialize_model_parallel(tp, context_parallel_size=cp)
    tensor = parallel_state.get_tensor_model_parallel_group()
    context = parallel_state.get_context_parallel_group()
    x, _, weight = _whole(_ENDS[-1], taps)
    own = _own(x, tensor, context)
    mask = own_chunks(_causal_mask(), context, dim=2) if cp > 1 else _causal_mask()
    reach = masked_reach(own, taps, tensor, context, mask)
    if cp == 1:
        packed = SimpleNamespace(cu_seqlens_q=torch.tensor(_ENDS), cu_seqlens_q_padded=None)
        of_packed = packed_reach(len(own), taps, tensor, context, packed)
        assert torch.equal(of_packed.expand_as(reach), reach)
    out = _convolution(weight)(own, neighbours_history(own, taps, tensor, context), reach)
    return _own(torch.arange(_ENDS[-1]), tensor, context), out.detach()


@pytest.mark.parametrize(("tp", "cp", "taps"), [(1, 1, 4), (2, 1, 3), (1, 2, 4), (2, 2, 6)])
def test_documents_in_one_sequence_are_as_each_alone(tp, cp, taps):
    x, _, weight = _whole(_ENDS[-1], taps)
    pairs = itertools.pairwise(_ENDS)
    expected = torch.cat([_convolution(weight)(x[a:b]).detach() for a, b in pairs])
    for positions, out in run_on_ranks(tp * cp, _documents_on_rank, tp, cp, taps):
        assert_close(out, expected[positions], rounding(torch.float64, taps))
