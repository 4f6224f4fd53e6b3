"""Side top-m: scores of one side's keys, their rank-1 combination, the m best keys of each head."""

from ultramem_megatron.kernels.side_topk.choice import kept_keys, side_topk
from ultramem_megatron.kernels.side_topk.reference import side_topk_reference

__all__ = ["kept_keys", "side_topk", "side_topk_reference"]
