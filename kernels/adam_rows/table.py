"""Which rows of a table are behind AdamW's steps, and what brings them up to date."""

import torch
from torch import Tensor

from ultramem_megatron.kernels.adam_rows import compact, half
from ultramem_megatron.kernels.adam_rows.choice import update
from ultramem_megatron.kernels.adam_rows.compact import CompactMoments
from ultramem_megatron.kernels.adam_rows.contract import Behind, Moments
from ultramem_megatron.kernels.adam_rows.history import SLOTS, AdamStep, History

type AnyMoments = Moments | CompactMoments
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

    @property
    def begun(self) -> bool:
        """Whether there was a step, so that rows may be behind."""
        return self._behind.history.count > 0

    def read(self, moments: AnyMoments | None, picks: Tensor) -> None:
        """Bring rows `picks`, int64, which may repeat, up to date; moments: None before any step.

        Called before each read that the next step's gradients come from, or any other.
        """
        rows = picks.flatten()
        self.touched.index_fill_(0, rows, 1)
        if moments is not None and self.begun:
            self._update(moments, rows)

    def step(self, moments: AnyMoments, grad: Tensor, step: AdamStep) -> None:
        """Make a step with the gradient (N, V), which is zero in rows that are not `touched`."""
        history = self._behind.history
        if self.begun and history[history.count][2:5] != step[2:5]:
            self.catch_up(moments)  # a history has the same betas and epsilon throughout
        rows = self.touched.nonzero().flatten()
        if isinstance(moments, CompactMoments) or moments.rounding is not None:
            self._update(moments, rows)  # those that other ranks have read
        history.append(step)
        self._update(moments, rows, grad)
        self.touched.zero_()
        self._sweep(moments)

    def catch_up(self, moments: AnyMoments) -> None:
        """Bring all rows up to date: the table and its moments are dense AdamW's."""
        every = torch.arange(len(self.touched), device=self.touched.device)
        for rows in every.split(_AT_ONCE):
            self._update(moments, rows)

    def _sweep(self, moments: AnyMoments) -> None:
        """Every row in its turn, which does not depend on how a table is cut."""
        history, rounding = self._behind.history, moments.rounding
        turn = history[history.count].number + (0 if rounding is None else rounding.first_row)
        first, end = -turn % (SLOTS - 1), len(self.touched)
        if first < end:
            rows = torch.arange(first, end, SLOTS - 1, device=self.touched.device)
            self._update(moments, rows)

    def _update(self, moments: AnyMoments, rows: Tensor, grad: Tensor | None = None) -> None:
        if isinstance(moments, CompactMoments):
            compact.update(moments, rows, self._behind, grad)
        elif moments.rounding is not None:
            half.update(moments, rows, self._behind, grad)
        else:
            update(moments, rows, self._behind, grad)
