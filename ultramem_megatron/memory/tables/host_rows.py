"""A table that is trained and lies in host memory, which may be larger than the device's.

A read brings the distinct rows that it names to the device, and its backward brings their gradient
back, where it is added up row by row. On the device nothing has the table's size.

To Megatron a number on the device stands for the table: a parameter with a gradient, whose place in
gradient buffers and optimizer groups is the table's. Whatever Megatron multiplies that gradient by,
the rows' gradient is multiplied by too (megatron/optimizer/host_tables.py).

N table rows, R of them that a read names, V value dim.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ultramem_megatron.kernels.lookup_reduce.main_grad import MAKES_MAIN_GRAD, added_to_main_grad
from ultramem_megatron.kernels.reading import ELSEWHERE, about_to_read


class HostRows:
    """The rows of one table, or of this rank's part; see kernels.reading.Elsewhere."""

    def __init__(self, weight: nn.Parameter, stand_in: nn.Parameter) -> None:
        """weight: (N, V) on the CPU. stand_in: (1, 1), float32, where the rows are read."""
        self.weight, self.stand_in = weight, stand_in
        self.gradient: Tensor | None = None
        """(N, V) float32, zero but in the rows that have one; from the first backward on."""
        self.norm = 0.0
        """Of the gradient, when it was complete last."""
        self.told: Callable[[Tensor], float] = float
        """A number of the stand-in's, as this rank has it, to what it is; may be a collective."""
        self._with_gradient: list[Tensor] = []
        self._is_complete = False

    def part(self) -> Tensor:
        """What stands for the table where it is read: its shape, dtype and device, one number."""
        one = torch.empty((), dtype=self.weight.dtype, device=self.stand_in.device)
        part = one.expand(self.weight.shape)
        setattr(part, ELSEWHERE, self)
        return part

    def bring(self, rows: Tensor) -> Tensor:
        """See Elsewhere; the host waits for the device, which says which rows."""
        rows = rows.cpu()
        about_to_read(self.weight, rows)
        if torch.is_grad_enabled() and self.stand_in.requires_grad:
            brought: Tensor = _Brought.apply(self.stand_in, self, rows)
            return brought
        return self.fetch(rows)

    @torch.no_grad()
    def fetch(self, rows: Tensor) -> Tensor:
        """Copies (R, V) of rows (R,) where they are read."""
        return self.weight[rows].to(self.stand_in.device)

    def add(self, rows: Tensor, gradient: Tensor) -> None:
        """Add the gradient (R, V) of distinct rows (R,); after a complete one, begin anew."""
        if self._is_complete:
            self._clear()
        if self.gradient is None:  # zeros that the system makes when they are written to
            self.gradient = torch.zeros(self.weight.shape, dtype=torch.float32)
        self.gradient.index_add_(0, rows, gradient.to("cpu", torch.float32))
        self._with_gradient.append(rows)
        main_grad: Tensor = self.stand_in.main_grad  # type: ignore[attr-defined]  # Megatron's tag
        main_grad.fill_(1)

    def complete(self) -> Tensor:
        """Rows (u,) that have a gradient since it was last complete; it is then."""
        self._is_complete = True
        if not self._with_gradient:
            return torch.empty(0, dtype=torch.int64)
        self._with_gradient = [torch.cat(self._with_gradient).unique()]
        return self._with_gradient[0]

    def complete_as(self, rows: Tensor) -> None:
        """These rows (u,) have a gradient: those of other ranks beside this one's."""
        self._with_gradient = [rows]

    def _clear(self) -> None:
        assert self.gradient is not None
        for rows in self._with_gradient:
            self.gradient.index_fill_(0, rows, 0)
        self._with_gradient, self._is_complete = [], False


class _MadeInBackward:
    """The gradient (R, V) of rows that were brought, float32; nothing before backward asks."""

    def __init__(self) -> None:
        self.gradient: Tensor | None = None

    def make(self, rows: Tensor) -> Tensor:
        """Zeros for these rows, once."""
        if self.gradient is None:
            self.gradient = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
        return self.gradient


class _Brought(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _stand_in: Tensor, home: HostRows, rows: Tensor) -> Tensor:
        ctx.home, ctx.rows, ctx.made = home, rows, _MadeInBackward()
        fetched = home.fetch(rows)
        setattr(fetched, MAKES_MAIN_GRAD, ctx.made)
        return fetched

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        made = ctx.made.gradient
        ctx.home.add(ctx.rows, grad.to_dense() if made is None else made)
        return added_to_main_grad(ctx.home.stand_in), None, None
