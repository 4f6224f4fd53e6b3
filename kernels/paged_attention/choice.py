"""Which attention over a paged cache runs; see dispatch.py."""

from torch import Tensor

from ultramem_megatron.kernels.dispatch import implementation
from ultramem_megatron.kernels.paged_attention.reference import Requests, paged_attention_reference


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    requests: Requests,
    scale: float,
    sinks: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Same contract as `paged_attention_reference`; on GPUs nothing is read on the host."""
    if implementation(query.device) != "triton":
        return paged_attention_reference(query, keys, values, requests, scale, sinks, window)
    from ultramem_megatron.kernels.paged_attention.triton_kernel import attend  # needs Triton

    return attend(query, keys, values, requests, scale, sinks, window)
