"""SGD on the rows of value tables that have a gradient: the others keep values and momentum.

Sparse memory finetuning prefers it to Adam (arXiv 2510.15103). N table rows, V value dim.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ultramem_megatron.megatron.optimizer.lazy_rows import touched_rows, update_instead


def make_lazy_sgd(optimizer: torch.optim.SGD, tables: Sequence[Tensor]) -> None:
    """From now on `optimizer.step()` updates only rows (N, V) of `tables` that have a gradient.

    Each as SGD does, with weight decay and momentum, from the same state, which has SGD's form.
    """
    update_instead(optimizer, tables, _update)


def _update(table: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> None:
    grad = table.grad
    assert grad is not None
    momentum = group["momentum"]
    if momentum and state.get("momentum_buffer") is None:
        state["momentum_buffer"] = torch.zeros_like(table)
    for rows in touched_rows(grad):
        step = grad[rows].add_(table[rows], alpha=group["weight_decay"])
        if momentum:
            step.add_(state["momentum_buffer"][rows], alpha=momentum)
            state["momentum_buffer"].index_copy_(0, rows, step)
        table.index_add_(0, rows, step, alpha=-group["lr"])
