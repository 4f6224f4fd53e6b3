"""The shuffle of virtual addresses."""

import pytest
import torch

from ultramem_megatron.memory.retrieval.addresses import GridShuffle, StoredShuffle, split_address


def _shuffle(side, seed=0):
    shuffle = GridShuffle(side)
    shuffle.reset(torch.Generator().manual_seed(seed))
    return shuffle(torch.arange(side * side))


@pytest.mark.parametrize("side", [1, 2, 3, 7, 64, 201])
def test_it_is_a_permutation(side):
    assert torch.equal(_shuffle(side).sort().values, torch.arange(side * side))


def test_it_looks_random():
    side = 128
    shuffled = _shuffle(side)
    assert (shuffled == torch.arange(side * side)).float().mean() < 0.01
    assert (_shuffle(side, seed=1) == shuffled).float().mean() < 0.01
    # Neighbours in a row of the grid fall anywhere: mean distance a third of the range.
    distance = (shuffled[1:] - shuffled[:-1]).abs().double().mean() / side**2
    assert distance == pytest.approx(1 / 3, abs=0.02)


def test_copies_of_a_value_rarely_share_a_row_or_column():
    side, expansion = 128, 4
    rows, _ = split_address(_shuffle(side), side * side // expansion)
    copies = rows.argsort().view(-1, expansion)  # virtual addresses of each value's copies
    same_row = (copies // side).sort(1).values.diff(dim=1).eq(0).any(1).double().mean()
    same_column = (copies % side).sort(1).values.diff(dim=1).eq(0).any(1).double().mean()
    by_chance = 1 - (1 - 1 / side) ** 6
    assert same_row == pytest.approx(by_chance, abs=0.02)
    assert same_column == pytest.approx(by_chance, abs=0.02)


def test_it_needs_far_less_memory_than_a_list():
    numbers = sum(buffer.numel() for buffer in GridShuffle(2000).buffers())
    assert numbers == 4 * 2000


def test_a_stored_permutation_is_kept_exactly():
    permutation = torch.randperm(100)
    stored = StoredShuffle(permutation)
    addresses = torch.randint(100, (5, 7))
    assert torch.equal(stored(addresses), permutation[addresses])
    assert stored.permutation.dtype == torch.int32


def test_split_address():
    row, group = split_address(torch.tensor([0, 9, 10, 35]), 10)
    assert row.tolist() == [0, 9, 0, 5]
    assert group.tolist() == [0, 0, 1, 3]


def test_tables_are_drawn_on_the_generators_device_whatever_the_default():
    shuffle = GridShuffle(5)
    with torch.device("meta"):
        shuffle.reset(torch.Generator("cpu").manual_seed(0))
    assert shuffle.tables.abs().sum() > 0
