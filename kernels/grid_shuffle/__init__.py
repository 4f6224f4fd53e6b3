"""The fixed shuffle of implicit value expansion: a Feistel network on the grid of keys."""

from ultramem_megatron.kernels.grid_shuffle.choice import grid_shuffle
from ultramem_megatron.kernels.grid_shuffle.reference import grid_shuffle_reference

__all__ = ["grid_shuffle", "grid_shuffle_reference"]
