"""Scores of a query with all keys of a side, and its best ones."""

from ultramem_megatron.kernels.side_topk.choice import kept_keys, side_topk
from ultramem_megatron.kernels.side_topk.reference import side_topk_reference
from ultramem_megatron.kernels.side_topk.sharing import per_head_and_rank, queries_apart

__all__ = ["kept_keys", "per_head_and_rank", "queries_apart", "side_topk", "side_topk_reference"]
