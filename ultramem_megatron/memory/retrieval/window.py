"""From a shuffled address to the values that a memory can read, of a table larger than its own.

A memory addresses w*w values, its window, e*e times each. The window starts at a row of the table
and goes on at row 0 past the end (arXiv 2508.18756; the authors' code shifts after the shuffle).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ultramem_megatron.memory.config import UltraMemConfig


class Window(NamedTuple):
    """Of one memory.

    size: values in it. start: its first row. rows: of the table it lies in. tables: one for each
    head, one after the other, or 1. grouped: what an address expands a value to has a projection
    of its own.
    """

    size: int
    start: int
    rows: int
    tables: int
    grouped: bool

    @property
    def is_whole(self) -> bool:
        """Whether shuffled addresses name rows and groups as they are."""
        return (self.size, self.start, self.tables) == (self.rows, 0, 1)


def window_of(config: UltraMemConfig, start: int) -> Window:
    """The window of a memory that starts at this row."""
    tables = config.heads if config.values_per_head else 1
    return Window(
        config.window_keys**2,
        start,
        config.num_values // tables,
        tables,
        grouped=config.value_expansion > 1,
    )


def window_module(config: UltraMemConfig, start: int) -> nn.Module:
    """From shuffled addresses (T, H*m) to those of the table, group * N + row, same shape."""
    window = window_of(config, start)
    if window.is_whole and (window.grouped or config.key_expansion == 1):
        return nn.Identity()
    return WindowAddresses(window)


class WindowAddresses(nn.Module):
    """Addresses within a window as addresses of its table."""

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window

    def forward(self, addresses: Tensor) -> Tensor:
        """addresses: (T, H*m) int64, below e*e*size; a token's heads follow each other."""
        size, start, rows, tables, grouped = self.window
        row = (addresses % size + start) % rows
        if tables > 1:
            head = torch.arange(tables, device=addresses.device)
            row = row + head.repeat_interleave(addresses.shape[1] // tables) * rows
        return addresses // size * (rows * tables) + row if grouped else row
