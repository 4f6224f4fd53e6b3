"""Which statistics run; see dispatch.py."""

import torch
from torch import Tensor

from ultramem_megatron.kernels.dispatch import implementation
from ultramem_megatron.kernels.read_statistics import native_path
from ultramem_megatron.kernels.read_statistics.reference import Counting, add_statistics_reference


def add_statistics(
    sums: Tensor,
    hits: Tensor,
    counting: Counting,
    addresses: Tensor,
    query: Tensor,
    scores: Tensor,
    output: Tensor,
    topk: int,
) -> None:
    """Same contract as `add_statistics_reference`, in one call or two kernels instead of twenty.

    A forward of no tokens adds nothing, where the means of nothing would stay NaN.
    """
    if not output.numel():
        return
    given = (sums, hits, counting, addresses, query, scores, output, topk)
    chosen = implementation(output.device)
    if chosen == "native" and native_path.serves(query, scores, output):
        native_path.add(*given)
        return
    if chosen != "triton" or output.dtype == torch.float64:
        add_statistics_reference(*given)
        return
    from ultramem_megatron.kernels.read_statistics.triton_kernels import add  # needs Triton

    add(*given)
