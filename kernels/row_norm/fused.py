"""Norms on GPUs: one kernel each way, and one that adds up the parts of the gain's gradient.

The output's rows may lie elsewhere than the input's, in pieces: keys are normed straight into the
order in which products take them. Letters as in reference.py.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ultramem_megatron.kernels.column_sums import column_sums
from ultramem_megatron.kernels.row_norm.triton_kernels import norm_backward_kernel, norm_kernel
from ultramem_megatron.kernels.side_topk.one_product import ALIGNED

ROWS = 16
"""Rows that one program of the backward sums the gain's gradient over."""


class Layout(NamedTuple):
    """Where rows of the input (blocks, rows, parts, W) go.

    Piece number p of W / width of part q of row n in block (group * group_blocks + b) * sides + s
    starts at group * by_group + s * by_side + (q + p) * by_part + b * by_block + n * width; `slots`
    rows, those beyond the input's zero. shape: of the whole output.
    """

    blocks: int
    rows: int
    parts: int
    slots: int
    width: int
    sides: int
    group_blocks: int
    by_group: int
    by_side: int
    by_part: int
    by_block: int
    shape: tuple[int, ...]

    def numbers(self) -> tuple[int, ...]:
        """As kernels take them."""
        return (self.rows, self.parts, self.slots, self.sides, self.group_blocks, *self[7:11])


def norm_rows(x: Tensor, gain: Tensor, eps: float, centred: bool) -> Tensor:
    """Same contract as `row_norm_reference`, for float32 and less."""
    rows = x.numel() // len(gain)
    layout = Layout(1, rows, 1, rows, len(gain), 1, 1, 0, 0, 0, 0, tuple(x.shape))
    out: Tensor = FusedRowNorm.apply(x, gain, eps, centred, layout)
    return out


def norm_keys(keys: Tensor, gain: Tensor, eps: float, centred: bool, queries: int) -> Tensor:
    """Same contract as `normed_keys_reference`, for float32 and less."""
    heads, sides, rows, ranks, width = keys.shape
    slots = rows + -rows % ALIGNED
    own = heads // queries
    block = slots * width
    shape = (queries, sides, ranks, own, slots, width)
    layout = Layout(
        blocks=heads * sides,
        rows=rows,
        parts=ranks * width // len(gain),
        slots=slots,
        width=width,
        sides=sides,
        group_blocks=own,
        by_group=sides * ranks * own * block,
        by_side=ranks * own * block,
        by_part=own * block,
        by_block=block,
        shape=shape,
    )
    stored: Tensor = FusedRowNorm.apply(keys, gain, eps, centred, layout)
    return stored


class FusedRowNorm(torch.autograd.Function):
    """A norm of rows, laid out anew."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, eps: float, centred: bool, layout: Layout
    ) -> Tensor:
        x, gain = x.contiguous(), gain.contiguous()
        out = x.new_empty(layout.shape)
        ctx.save_for_backward(x, gain)
        ctx.constants = {"EPS": eps, "CENTRED": centred, **row_sizes(len(gain), layout.width)}
        ctx.layout = layout
        if out.numel():
            programs = layout.blocks * layout.slots * layout.parts
            with torch.cuda.device_of(x):
                norm_kernel[(programs,)](x, gain, out, *layout.numbers(), **ctx.constants)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain = ctx.saved_tensors
        layout: Layout = ctx.layout
        grad_x = torch.empty_like(x)
        if not x.numel():
            return grad_x, torch.zeros_like(gain), None, None, None
        programs = layout.blocks * triton.cdiv(layout.rows, ROWS) * layout.parts
        partial = torch.empty(programs, len(gain), dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            norm_backward_kernel[(programs,)](
                grad.contiguous(),
                x,
                gain,
                grad_x,
                partial,
                *layout.numbers(),
                TILE=ROWS,
                **ctx.constants,
            )
            grad_gain = column_sums(partial, gain.dtype).flatten()
        return grad_x, grad_gain, None, None, None


def row_sizes(row: int, width: int) -> dict[str, int]:
    """Launch constants for rows of so many numbers in pieces of `width`."""
    block = triton.next_power_of_2(row)
    return {"ROW": row, "WIDTH": width, "BLOCK": block, "num_warps": max(1, min(8, block // 512))}
