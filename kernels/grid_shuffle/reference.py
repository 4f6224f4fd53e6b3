"""The shuffle in the plainest form: rounds of additions in PyTorch.

Source of the need: UltraMem, arXiv 2411.12364, section 3.4 (eq. 13); of the form: Feistel networks,
whose rounds can be undone whatever their functions are.
"""

from torch import Tensor


def grid_shuffle_reference(addresses: Tensor, tables: Tensor) -> Tensor:
    """Shuffled addresses, a permutation of 0..side^2-1, in the shape given, int64.

    addresses: int64, row * side + column. tables: (rounds, side) integers below `side`, rounds
    even. Each pair of rounds does row += tables[i][column], then column += tables[i+1][row], modulo
    the side.

    On a side of 3 with tables [[1, 0, 2], [0, 0, 1]] address 5, row 1 and column 2, goes to row
    (1 + 2) % 3 = 0 and column (2 + 0) % 3 = 2, address 2.
    """
    rounds, side = tables.shape
    row, column = addresses // side, addresses % side
    for index in range(0, rounds, 2):
        row = (row + tables[index][column]) % side
        column = (column + tables[index + 1][row]) % side
    return row * side + column
