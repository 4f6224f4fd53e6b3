"""A mean of the steps before that is taken off inputs, and the sums that it follows."""

from ultramem_megatron.kernels.query_centring.choice import update_mean
from ultramem_megatron.kernels.query_centring.reference import (
    Centring,
    centred_reference,
    update_mean_reference,
)

__all__ = ["Centring", "centred_reference", "update_mean", "update_mean_reference"]
