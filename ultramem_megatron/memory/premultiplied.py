"""Values multiplied by their projections once, so that decoding projects nothing.

Nothing nonlinear stands between a value and its projection (eq. 15), so that
sum s * V[row] @ W_p = sum s * (V @ W_p)[row]. With C cores each slice of a value has a score of its
own, hence a product of its own: C*D numbers for each of E*N virtual values, where Dv for each of N
were.

N physical values, Dv value dim, E expansion, C cores, D hidden, T tokens, P picks per token.
"""

import torch
from torch import Tensor, nn

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.kernels.lookup_reduce import lookup_reduce


class PremultipliedValues(nn.Module):
    """The table of virtual values, (E*N, C*D), in the order of shuffled addresses."""

    table: Tensor

    def __init__(self, values: Tensor, projection: Tensor, cores: int) -> None:
        """values: (N, Dv), projection: (D, E*Dv); the table has their dtype and device.

        Raises UltraMemError if there is no memory for it.
        """
        super().__init__()
        number, width = values.shape
        hidden, expansion = len(projection), projection.shape[1] // width
        self.cores = cores
        by_slice = projection.view(hidden, expansion, cores, width // cores)
        self.register_buffer("table", _allocate(expansion * number, cores * hidden, values), False)
        products = self.table.view(expansion, number, cores, hidden)
        with torch.no_grad():
            for group in range(expansion):
                for core, part in enumerate(values.chunk(cores, dim=1)):
                    products[group, :, core] = part @ by_slice[:, group, core].T

    def forward(self, addresses: Tensor, scores: Tensor) -> Tensor:
        """Outputs (T, D) for shuffled virtual addresses (T, P) and scores (T, P, C)."""
        one_group = torch.zeros_like(addresses)
        pooled = lookup_reduce(self.table, addresses, one_group, scores, 1)  # (T, 1, C*D)
        return pooled.view(len(pooled), self.cores, -1).sum(1)


def _allocate(rows: int, width: int, like: Tensor) -> Tensor:
    try:
        return like.new_empty(rows, width)
    except RuntimeError as error:  # torch.OutOfMemoryError on a GPU is one
        raise UltraMemError(
            f"--premultiply-values: {rows} virtual values of width {width} take "
            f"{rows * width * like.element_size() / 1e9:.1f} GB for each memory layer, more than "
            f"can be had here. Decode without it."
        ) from error
