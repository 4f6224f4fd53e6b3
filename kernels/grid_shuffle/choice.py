"""Which shuffle runs; see dispatch.py."""

from torch import Tensor

from ultramem_megatron.kernels.dispatch import implementation
from ultramem_megatron.kernels.grid_shuffle import native_path
from ultramem_megatron.kernels.grid_shuffle.reference import grid_shuffle_reference


def grid_shuffle(addresses: Tensor, tables: Tensor) -> Tensor:
    """Same contract as `grid_shuffle_reference`; in one kernel instead of sixteen."""
    chosen = implementation(addresses.device)
    if chosen == "native":
        return native_path.shuffle(addresses, tables)
    if chosen != "triton":
        return grid_shuffle_reference(addresses, tables)
    from ultramem_megatron.kernels.grid_shuffle.triton_kernel import shuffle  # needs Triton

    return shuffle(addresses, tables)
