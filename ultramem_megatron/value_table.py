"""The physical value table and its read: the memory itself."""

import torch
from torch import Tensor, nn

from ultramem_megatron.kernels.lookup_reduce import lookup_reduce


class ValueTable(nn.Module):
    """N values of width Dv, kept whole on this rank.

    The parameter carries `ultramem_values = True`, by which the optimizer gives it a learning rate
    of its own.
    """

    def __init__(self, num_values: int, value_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_values, value_dim))
        mark_as_values(self.weight)

    def forward(self, rows: Tensor, groups: Tensor, scores: Tensor, num_groups: int) -> Tensor:
        """Pooled values (T, E, Dv) for rows, groups (T, P) and scores (T, P, C)."""
        return lookup_reduce(self.weight, rows, groups, scores, num_groups)


def mark_as_values(parameter: nn.Parameter) -> None:
    """Tag a parameter as a value table."""
    parameter.ultramem_values = True  # type: ignore[attr-defined]
