"""Causal attention over a cache of keys and values in blocks, for decoding."""

from ultramem_megatron.kernels.paged_attention.choice import paged_attention
from ultramem_megatron.kernels.paged_attention.reference import Requests, paged_attention_reference

__all__ = ["Requests", "paged_attention", "paged_attention_reference"]
