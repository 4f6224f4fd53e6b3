"""Tucker grid top-m: exact scores of the m x m shortlisted pairs, the m best with their scores."""

from ultramem_megatron.kernels.tucker_topk.choice import tucker_topk
from ultramem_megatron.kernels.tucker_topk.reference import tucker_topk_reference

__all__ = ["tucker_topk", "tucker_topk_reference"]
