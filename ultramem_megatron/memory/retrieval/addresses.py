"""Virtual address to (physical row, expansion group): the fixed shuffle of IVE (paper 3.4, eq. 13).

The E copies of a value must not share a row or a column of the key grid, so addresses are shuffled
once and for all. A table of E*N numbers would cost more memory than the keys; the default shuffle
is computed instead.
"""

import torch
from torch import Tensor, nn

from ultramem_megatron.kernels.grid_shuffle import grid_shuffle
from ultramem_megatron.memory.config import UltraMemConfig

_MOST_BINS = 128


class GridShuffle(nn.Module):
    """A fixed random permutation of the side x side grid from a few tables of `side` numbers.

    See `grid_shuffle_reference`. The tables, random functions of a coordinate, are saved with the
    model.
    """

    ROUNDS = 4
    tables: Tensor

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self.register_buffer("tables", torch.zeros(self.ROUNDS, side, dtype=torch.int32))

    def reset(self, generator: torch.Generator) -> None:
        """Draw new round tables; with all zeros the permutation is the identity."""
        drawn = torch.randint(
            self.side,
            self.tables.shape,
            generator=generator,
            device=generator.device,
            dtype=torch.int32,
        )
        self.tables.copy_(drawn)

    def forward(self, addresses: Tensor) -> Tensor:
        """Shuffled addresses, same shape, int64, a permutation of 0..side^2-1."""
        return grid_shuffle(addresses, self.tables)


class StoredShuffle(nn.Module):
    """A permutation given as a list, kept exactly (models trained elsewhere)."""

    permutation: Tensor

    def __init__(self, permutation: Tensor) -> None:
        """permutation: (E*N,), any integer dtype; kept as int32."""
        super().__init__()
        self.register_buffer("permutation", permutation.to(torch.int32))

    def forward(self, addresses: Tensor) -> Tensor:
        """Shuffled addresses, same shape, int64."""
        return self.permutation[addresses].long()


def shuffles(config: UltraMemConfig) -> bool:
    """Whether addresses are shuffled: where one value has several, or one memory others' values."""
    return config.key_expansion != 1 or config.window_keys != config.num_keys


def grid_bins(side: int) -> int:
    """B: bins on each side of a picture of the key grid."""
    return min(side, _MOST_BINS)


def grid_counts(addresses: Tensor, side: int) -> Tensor:
    """How often the key grid was read, (B, B) int64: row keys by column keys, in B bins a side.

    addresses: before the shuffle, row * side + column. See `grid_bins`.
    """
    bins = grid_bins(side)
    row, column = addresses // side * bins // side, addresses % side * bins // side
    bin_of = (row * bins + column).flatten()
    counts = torch.zeros(bins * bins, dtype=torch.int64, device=addresses.device)
    # Unlike bincount it lets the host run on.
    return counts.scatter_add_(0, bin_of, torch.ones_like(bin_of)).view(bins, bins)


def split_address(shuffled: Tensor, num_values: int) -> tuple[Tensor, Tensor]:
    """Physical row (0..N-1) and expansion group (0..E-1) of a shuffled address."""
    return shuffled % num_values, shuffled // num_values
