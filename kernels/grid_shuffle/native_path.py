"""The shuffle through native.cpp, in one call."""

import torch
from torch import Tensor

from ultramem_megatron.kernels.native.library import call_native


def shuffle(addresses: Tensor, tables: Tensor) -> Tensor:
    """Same contract as `grid_shuffle_reference`."""
    given = addresses.contiguous()
    target = torch.empty_like(given)
    sizes = (given.numel(), *tables.shape)
    call_native("grid_shuffle", given, tables.int().contiguous(), target, *sizes)
    return target
