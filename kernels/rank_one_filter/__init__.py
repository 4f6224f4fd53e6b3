"""The rank-1 filter of the Tucker cores, brought up to date with them."""

from ultramem_megatron.kernels.rank_one_filter.choice import update_filter
from ultramem_megatron.kernels.rank_one_filter.reference import update_filter_reference

__all__ = ["update_filter", "update_filter_reference"]
