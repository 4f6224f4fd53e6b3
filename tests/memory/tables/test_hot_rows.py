"""The cache of rows: what is read never differs, and what stays is what is read most."""

import pytest
import torch

from ultramem_megatron.memory.tables.hot_rows import MOST, WAYS, HotRows

_ROWS = 500
_TABLE = torch.arange(_ROWS * 3, dtype=torch.float32).view(_ROWS, 3)


class _Fetch:
    """Rows of a table in two parts, as codes and scales are; remembers what was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, rows):
        self.asked += rows.tolist()
        return _TABLE[rows], _TABLE[rows, :1].long()


def _steps(steps=60, reads=40):
    """Rows of each step, some of them much more likely than others."""
    generator = torch.Generator().manual_seed(4)
    likely = 1 / torch.arange(1, _ROWS + 1.0)
    order = torch.randperm(_ROWS, generator=generator)
    for _ in range(steps):
        drawn = torch.multinomial(likely, reads, True, generator=generator)
        yield order[drawn].unique()


class _Slow:
    """The same cache, row by row: for each set, its slots' rows and counts."""

    def __init__(self, rows):
        self.sets = [[[None, 0] for _ in range(WAYS)] for _ in range(max(1, rows // WAYS))]

    def read(self, rows):
        held, missing = [], []
        for row in rows:
            slots = self.sets[row % len(self.sets)]
            slot = next((slot for slot in slots if slot[0] == row), None)
            (missing if slot is None else held).append(row)
            if slot is not None:
                slot[1] = min(MOST, slot[1] + 1)
        full = set()
        for number, slots in enumerate(self.sets):
            free = [slot for slot in slots if slot[1] == 0]
            for row in (row for row in missing if row % len(self.sets) == number):
                if free:
                    free.pop(0)[:] = [row, None]
                else:
                    full.add(number)
        for number, slots in enumerate(self.sets):
            for slot in slots:
                if slot[1] is None:
                    slot[1] = 1
                elif number in full:
                    slot[1] = max(0, slot[1] - 1)
        return held, missing


@pytest.mark.parametrize("capacity", [1, 8, 64, 4000])
def test_it_holds_what_the_slow_one_holds_and_gives_what_the_table_has(capacity):
    hot, slow, fetch, hits = HotRows(capacity), _Slow(capacity), _Fetch(), 0
    for rows in _steps():
        held, missing = slow.read(rows.tolist())
        assert hot.missing(rows.flip(0)).tolist() == missing
        fetch.asked.clear()
        numbers, others = hot.read(rows, fetch)
        assert fetch.asked == missing
        assert torch.equal(numbers, _TABLE[rows])
        assert torch.equal(others, _TABLE[rows, :1].long())
        hits += len(held)
    assert hot.hits == hits
    assert hot.reads == sum(len(rows) for rows in _steps())
    assert hot.bytes == max(1, capacity // WAYS) * WAYS * (3 * 4 + 8)


def test_rows_that_are_read_often_outlive_many_that_are_read_once():
    hot, often = HotRows(WAYS), torch.arange(WAYS - 2)
    for step in range(50):
        once = torch.tensor([100 + step])
        hot.read(torch.cat([often, once]), _Fetch())
    assert hot.holds(often).all()
    assert hot.hits == 49 * len(often)
    for step in range(3 * MOST):  # and go when they are read no more
        hot.read(torch.tensor([200 + 2 * step, 201 + 2 * step, 7, 8]), _Fetch())
    assert not hot.holds(often).any()
    assert hot.holds(torch.tensor([7, 8])).all()


def test_nothing_is_read_of_nothing():
    hot = HotRows(8)
    for _ in range(2):
        numbers, _ = hot.read(torch.empty(0, dtype=torch.int64), _Fetch())
        assert numbers.shape == (0, 3)
    assert (hot.reads, hot.hits) == (0, 0)
