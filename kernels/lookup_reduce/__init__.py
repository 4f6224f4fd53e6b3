"""Lookup-reduce: gather table rows, weight them per core, sum them per expansion group."""

from ultramem_megatron.kernels.lookup_reduce.autograd import lookup_addresses, lookup_reduce
from ultramem_megatron.kernels.lookup_reduce.quantized import lookup_quantized
from ultramem_megatron.kernels.lookup_reduce.reference import lookup_reduce_reference

__all__ = ["lookup_addresses", "lookup_quantized", "lookup_reduce", "lookup_reduce_reference"]
