"""Scores are combined and compared in float32 or better, whatever dtype the model computes in."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is already."""
    return x if x.dtype == torch.float64 else x.float()
