"""AdamW on rows of a table in bfloat16, which has no copy in float32.

Copies of rows make the steps in float32 and are rounded back: when they are brought up to date, and
after a step with a gradient. Who reads a row first does not matter: all ranks bring it up to date
to the same step, and rounding depends on nothing else (Rounding).

N table rows, u of them, V value dim.
"""

import torch
from torch import Tensor

from ultramem_megatron.kernels.adam_rows.choice import update as update_dense
from ultramem_megatron.kernels.adam_rows.contract import Behind, Moments

AT_ONCE = 2**16
"""Rows that are in float32 at a time."""


def update(moments: Moments, rows: Tensor, behind: Behind, grad: Tensor | None = None) -> None:
    """As `compact.update`; values have a rounding."""
    (current, history), rounding = behind, moments.rounding
    assert rounding is not None
    rows = rows[current[rows] < history.count].unique()
    for some in rows.split(AT_ONCE) if len(rows) else ():
        piece = Moments(moments.values[some].float(), moments.mean[some], moments.square[some])
        own = Behind(current[some], history)
        every = torch.arange(len(some), device=some.device)
        update_dense(piece, every, own, None if grad is None else grad[some])
        number = history[history.count].number
        moments.values.index_copy_(0, some, rounding.rounded(piece.values, some, number))
        moments.mean.index_copy_(0, some, piece.mean)
        moments.square.index_copy_(0, some, piece.square)
        current.index_fill_(0, some, history.count)
