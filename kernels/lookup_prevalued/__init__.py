"""Lookup of values behind pre-values: gather, dot, scale, gather and sum in one pass."""

from ultramem_megatron.kernels.lookup_prevalued.autograd import lookup_prevalued
from ultramem_megatron.kernels.lookup_prevalued.quantized import lookup_prevalued_quantized
from ultramem_megatron.kernels.lookup_prevalued.reference import lookup_prevalued_reference

__all__ = ["lookup_prevalued", "lookup_prevalued_quantized", "lookup_prevalued_reference"]
