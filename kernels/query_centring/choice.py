"""Which update of the mean runs; see dispatch.py. Its subtraction is in causal_convolution."""

from torch import Tensor

from ultramem_megatron.kernels.dispatch import implementation
from ultramem_megatron.kernels.query_centring.reference import update_mean_reference


def update_mean(mean: Tensor, updates: Tensor, sums: Tensor, momentum: float) -> None:
    """Same contract as `update_mean_reference`; on GPUs one kernel instead of nineteen."""
    if implementation(mean.device) != "triton":
        update_mean_reference(mean, updates, sums, momentum)
        return
    from ultramem_megatron.kernels.query_centring.triton_kernels import moved  # needs Triton

    moved(mean, updates, sums, momentum)
