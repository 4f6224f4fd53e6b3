"""Which update of the filter runs; see dispatch.py."""

from torch import Tensor

from ultramem_megatron.kernels.rank_one_filter.reference import update_filter_reference
from ultramem_megatron.kernels.small_svd import decomposes


def update_filter(cores: Tensor, u: Tensor, t: Tensor) -> Tensor:
    """Same contract as `update_filter_reference`; on GPUs one kernel instead of 25.

    There the host does not wait, and what holds NaN gives NaN instead of an error.
    """
    if not decomposes(cores):
        return update_filter_reference(cores, u, t)
    from ultramem_megatron.kernels.rank_one_filter.triton_kernel import update  # needs Triton

    return update(cores.detach(), u, t)
