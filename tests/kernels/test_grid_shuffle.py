"""The fixed shuffle: its worked case, every implementation, a permutation of any side."""

import os

import pytest
import torch

from tests.kernels.compiler import NATIVE, needs_compiler
from ultramem_megatron.kernels.grid_shuffle import grid_shuffle, grid_shuffle_reference

TRITON = ["triton"] if os.environ.get("TRITON_INTERPRET") else []


@pytest.fixture(params=["reference", NATIVE, *TRITON])
def forced(request, monkeypatch):
    """Each implementation in turn."""
    monkeypatch.setenv("ULTRAMEM_KERNELS", request.param)
    return request.param


def _tables(side):
    drawn = torch.randint(side, (4, side), generator=torch.Generator().manual_seed(side))
    return drawn.int()


def test_worked_case(forced):
    tables = torch.tensor([[1, 0, 2], [0, 0, 1]], dtype=torch.int32)
    assert grid_shuffle(torch.tensor([5]), tables).tolist() == [2]


@pytest.mark.parametrize("side", [1, 2, 7, 40])
def test_it_is_a_permutation(forced, side):
    addresses = torch.arange(side * side).view(side, side).t()
    shuffled = grid_shuffle(addresses, _tables(side))
    assert shuffled.shape == addresses.shape
    assert shuffled.flatten().sort().values.tolist() == list(range(side * side))
    assert torch.equal(shuffled, grid_shuffle_reference(addresses, _tables(side)))


def test_sides_whose_square_needs_64_bits(forced):
    side = 100_003
    last = side * side - 1 - torch.arange(3)
    shuffled = grid_shuffle(last, _tables(side))
    assert torch.equal(shuffled, grid_shuffle_reference(last, _tables(side)))
    assert shuffled.min() > 2**31


def test_no_addresses(forced):
    none = torch.empty(0, 4, dtype=torch.int64)
    assert grid_shuffle(none, _tables(3)).shape == (0, 4)


@needs_compiler
def test_damaged_tables_are_read_within_bounds(monkeypatch):
    """As PyTorch reads them: modulo the side."""
    monkeypatch.setenv("ULTRAMEM_KERNELS", "native")
    tables = torch.tensor([[-1, 2**31 - 1, 9], [-(2**31), 4, 3]], dtype=torch.int32)
    addresses = torch.arange(9)
    assert torch.equal(
        grid_shuffle(addresses, tables), grid_shuffle_reference(addresses, tables.long())
    )
