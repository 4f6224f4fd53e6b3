"""The m largest of a row: exact, and the same choice among equals everywhere."""

import pytest
import torch

from ultramem_megatron.kernels.selection import largest


def _by_sorting(values, topk):
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :topk]


@pytest.mark.parametrize(
    ("columns", "topk"),
    [(1, 1), (7, 7), (40, 1), (64, 5), (100, 3), (511, 17), (1024, 32), (1764, 42), (1031, 32)],
)
def test_it_equals_a_stable_sort_whatever_the_ties(columns, topk):
    distinct = torch.randn(6, columns)
    negative = -1 - distinct.abs()  # nothing that rows are filled up with may be larger
    tied = distinct.mul(2).round(), distinct.clamp(max=1), distinct * 0
    for values in (distinct, negative, *tied):
        assert torch.equal(largest(values, topk), _by_sorting(values, topk))
    assert largest(distinct[:0], topk).shape == (0, topk)
    assert torch.equal(
        largest(distinct.view(2, 3, -1), topk), _by_sorting(distinct, topk).view(2, 3, -1)
    )


def test_infinities_and_nan_have_their_place():
    values = torch.full((3, 500), float("-inf"))
    values[0, [3, 77, 400]] = torch.tensor([float("nan"), float("inf"), float("nan")])
    values[1, [20, 21]] = torch.tensor([0.0, -0.0])
    assert torch.equal(largest(values, 5), _by_sorting(values, 5))
    assert largest(values, 5).tolist() == [[3, 400, 77, 0, 1], [20, 21, 0, 1, 2], [0, 1, 2, 3, 4]]
