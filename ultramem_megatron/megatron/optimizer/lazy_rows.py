"""Optimizers that leave rows of value tables without a gradient as they are, with their state."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

ROWS_AT_ONCE = 2**16
UpdateRows = Callable[[Tensor, dict[str, Any], dict[str, Tensor]], None]
"""Takes a table with its gradient (N, V), its parameter group and its state, which it moves on."""


def update_instead(
    optimizer: torch.optim.Optimizer, tables: Sequence[Tensor], update: UpdateRows
) -> None:
    """From now on, `update` makes the steps of `tables`, and `optimizer` those of all else."""
    chosen = {id(table) for table in tables}

    @torch.no_grad()
    def before_step(_optimizer: Any, _args: Any, _kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in chosen and parameter.grad is not None:
                    update(parameter, group, optimizer.state[parameter])
                    parameter.grad = None  # which the optimizer passes over

    optimizer.register_step_pre_hook(before_step)


def touched_rows(grad: Tensor) -> Iterator[Tensor]:
    """Numbers of the rows (u,) that have a gradient (N, V), some at a time."""
    touched = torch.linalg.vector_norm(grad, ord=math.inf, dim=1).nonzero().flatten()
    yield from touched.split(ROWS_AT_ONCE)
