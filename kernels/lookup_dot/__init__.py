"""Lookup-dot: gather table rows and multiply each by its token's vector."""

from ultramem_megatron.kernels.lookup_dot.autograd import lookup_dot
from ultramem_megatron.kernels.lookup_dot.reference import lookup_dot_reference

__all__ = ["lookup_dot", "lookup_dot_reference"]
