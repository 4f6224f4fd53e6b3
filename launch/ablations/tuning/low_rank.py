"""A change of a weight matrix of few dimensions."""

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """W + B A, with B zero at first (LoRA, arXiv 2106.09685)."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(torch.randn(rank, columns) / columns**0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """weight: (rows, columns)."""
        return weight + self.up @ self.down
