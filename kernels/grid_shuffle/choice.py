"""Which shuffle runs; see dispatch.py."""

from torch import Tensor

from ultramem_megatron.kernels.dispatch import implementation
from ultramem_megatron.kernels.grid_shuffle.reference import grid_shuffle_reference


def grid_shuffle(addresses: Tensor, tables: Tensor) -> Tensor:
    """Same contract as `grid_shuffle_reference`; on GPUs in one kernel instead of sixteen."""
    if implementation(addresses.device) != "triton":
        return grid_shuffle_reference(addresses, tables)
    from ultramem_megatron.kernels.grid_shuffle.triton_kernel import shuffle  # needs Triton

    return shuffle(addresses, tables)
