"""Which rows a batch may move, against the paper's formula written as a loop."""

import math

import pytest
import torch

from ultramem_megatron.memory.row_choice import choose_rows, rarity


def _plain(reads, background, batches, most):
    """Sorted by -score, then row; of rows that were read."""
    total = sum(reads)
    scored = [
        (-count / total * math.log((batches + 1) / (background[row] + 1)), row)
        for row, count in enumerate(reads)
        if count
    ]
    return sorted(row for _, row in sorted(scored)[:most])


@pytest.mark.parametrize("most", [1, 3, 17, 200])
def test_rows_are_those_of_the_formula(most):
    generator = torch.Generator().manual_seed(most)
    # A total that is a power of two divides without rounding, so ties stay ties in the loop too.
    reads = torch.randint(0, 4, (200,), generator=generator)
    reads[0] += 512 - reads.sum()
    background = torch.randint(0, 6, (200,), generator=generator)
    chosen = choose_rows(reads.int(), rarity(background, 5), most)
    assert chosen.tolist() == _plain(reads.tolist(), background.tolist(), 5, most)
    assert len(chosen) == min(most, int((reads > 0).sum()))


def test_ties_go_to_the_lower_rows_and_common_rows_come_last():
    reads = torch.tensor([0, 2, 2, 9, 2, 1])
    background = torch.tensor([0, 1, 1, 3, 1, 0])  # of 3 batches: row 3 is in all
    weights = rarity(background, 3)
    assert weights[3] == 0
    assert choose_rows(reads, weights, 2).tolist() == [1, 2]
    assert choose_rows(reads, weights, 4).tolist() == [1, 2, 4, 5]
    assert choose_rows(reads, weights, 6).tolist() == [1, 2, 3, 4, 5]
    assert choose_rows(torch.zeros(6, dtype=torch.int32), weights, 6).tolist() == []
