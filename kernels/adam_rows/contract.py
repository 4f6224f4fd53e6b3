"""What the implementations of AdamW on rows take. N table rows, V value dim."""

from typing import NamedTuple

from torch import Tensor

from ultramem_megatron.kernels.adam_rows.history import History
from ultramem_megatron.kernels.adam_rows.rounding import Rounding


class Moments(NamedTuple):
    """A table as AdamW trains it, contiguous; moved in place."""

    values: Tensor
    """(N, V), at least float32."""
    mean: Tensor
    """(N, V): exp_avg."""
    square: Tensor
    """(N, V): exp_avg_sq."""
    copy: Tensor | None = None
    """(N, V): the values in half precision, which the model reads."""
    rounding: Rounding | None = None
    """Of values that are in bfloat16 themselves; none in float32."""


class Behind(NamedTuple):
    """Rows and the steps that they have made. current: (N,) int32, of history.count."""

    current: Tensor
    history: History
