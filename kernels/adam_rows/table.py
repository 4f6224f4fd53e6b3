"""Which rows of a table are behind AdamW's steps, and what brings them up to date."""

import torch
from torch import Tensor

from ultramem_megatron.kernels.adam_rows.choice import update
from ultramem_megatron.kernels.adam_rows.contract import Behind, Moments
from ultramem_megatron.kernels.adam_rows.history import SLOTS, AdamStep, History

_AT_ONCE = 2**16  # rows


class AdamRows:
    """AdamW for a table (N, V) of which a step reads some rows, and has gradients for no others.

    A row makes the steps it has missed before it is read, and a share of all rows in each step, so
    that none misses more than the history keeps.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.touched = torch.zeros(num_rows, dtype=torch.uint8, device=device)
        """(N,): 1 for rows that may have a gradient, read since the last step."""
        current = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self._behind = Behind(current, History(device))
        self._swept = 0

    @property
    def begun(self) -> bool:
        """Whether there was a step, so that rows may be behind."""
        return self._behind.history.count > 0

    def read(self, moments: Moments | None, picks: Tensor) -> None:
        """Bring rows `picks`, int64, which may repeat, up to date; moments: None before any step.

        Called before each read that the next step's gradients come from, or any other.
        """
        rows = picks.flatten()
        self.touched.index_fill_(0, rows, 1)
        if moments is not None and self.begun:
            update(moments, rows, self._behind)

    def step(self, moments: Moments, grad: Tensor, step: AdamStep) -> None:
        """Make a step with the gradient (N, V), which is zero in rows that are not `touched`."""
        history = self._behind.history
        if self.begun and history[history.count][2:5] != step[2:5]:
            self.catch_up(moments)  # a history has the same betas and epsilon throughout
        history.append(step)
        update(moments, self.touched.nonzero().flatten(), self._behind, grad)
        self.touched.zero_()
        self._sweep(moments)

    def catch_up(self, moments: Moments) -> None:
        """Bring all rows up to date: the table and its moments are dense AdamW's."""
        for first in range(0, len(self.touched), _AT_ONCE):
            self._bring(moments, first, first + _AT_ONCE)

    def _sweep(self, moments: Moments) -> None:
        rows = len(self.touched)
        share = -(-rows // (SLOTS - 1))
        self._bring(moments, self._swept, self._swept + share)
        self._swept = self._swept + share if self._swept + share < rows else 0

    def _bring(self, moments: Moments, first: int, end: int) -> None:
        rows = torch.arange(first, min(end, len(self.touched)), device=self.touched.device)
        update(moments, rows, self._behind)
