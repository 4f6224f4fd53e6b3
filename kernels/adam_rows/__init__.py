"""AdamW on rows of a table: each makes the steps it has missed when somebody needs it."""

from ultramem_megatron.kernels.adam_rows.contract import Moments
from ultramem_megatron.kernels.adam_rows.history import AdamStep
from ultramem_megatron.kernels.adam_rows.table import AdamRows, AnyMoments

__all__ = ["AdamRows", "AdamStep", "AnyMoments", "Moments"]
