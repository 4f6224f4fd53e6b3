"""Rounding to bfloat16, up or down at random, so that on average nothing is lost.

A table in bfloat16 without a float32 copy would stand still: a step moves most values by less than
half of what is between two neighbours. Rounded up as often as a value is near its upper neighbour
(stochastic rounding; for training in bfloat16 arXiv 2010.06192), the mean of many steps is right.

The random number of a value is a hash of (key, step, row, column) alone, so that it depends neither
on how a table is cut nor on who rounds. N table rows, u of them, V value dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_ADDS = (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03)
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # splitmix64's
_LOST = 16  # bits of float32 that bfloat16 has not


class Rounding(NamedTuple):
    """What the random numbers of a table, or of this rank's part of it, depend on."""

    key: int
    """Of the run and the table."""
    first_row: int = 0
    first_column: int = 0

    def rounded(self, values: Tensor, rows: Tensor, step: int) -> Tensor:
        """values (u, V), float32, of rows (u,) after this step, in bfloat16."""
        below = self.draws(rows, values.shape[1], step)
        bits = (values.contiguous().view(torch.int32) + below) & -(1 << _LOST)
        return torch.where(values.isfinite(), bits.view(torch.float32), values).bfloat16()

    def draws(self, rows: Tensor, columns: int, step: int) -> Tensor:
        """Whole numbers (u, V) below 2^16, int32, evenly."""
        of_step = _mixed(torch.tensor(_signed(self.key + step * _ADDS[1]), device=rows.device))
        of_row = _mixed(of_step + (rows + self.first_row) * _signed(_ADDS[0]))
        column = torch.arange(1, columns + 1, device=rows.device) + self.first_column
        mixed = _mixed(of_row[:, None] + column * _signed(_ADDS[0]))
        return (mixed & ((1 << _LOST) - 1)).to(torch.int32)


def _mixed(numbers: Tensor) -> Tensor:
    """A hash of int64, each bit of which depends on all (splitmix64's last steps)."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        numbers = (numbers ^ _shifted(numbers, shift)) * _signed(multiplier)
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Tensor, by: int) -> Tensor:
    """To the right, as unsigned."""
    return (numbers >> by) & ((1 << (64 - by)) - 1)


def _signed(number: int) -> int:
    """The int64 of these 64 bits."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number
