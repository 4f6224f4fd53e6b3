"""Lazy Adam for value tables: rows whose gradient is zero keep their values and moments.

Dense Adam moves every row at every step, by its momentum and by weight decay. Fine-tuning of few
rows (train_rows.py) leaves the rest alone. A row that has a gradient is updated exactly as AdamW
updates it from the same state, with the bias correction of the step's number. Others differ: no
momentum carries on, nothing decays in between.

N table rows, V value dim.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ultramem_megatron.megatron.optimizer.lazy_rows import touched_rows, update_instead


def make_lazy(optimizer: torch.optim.AdamW, tables: Sequence[Tensor]) -> None:
    """From now on `optimizer.step()` updates only rows (N, V) of `tables` that have a gradient.

    The state has the form of AdamW's, so checkpoints of both fit each other.
    """
    update_instead(optimizer, tables, _update)


def _update(table: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> None:
    grad = table.grad
    assert grad is not None
    for name in ("exp_avg", "exp_avg_sq"):
        if name not in state:
            state[name] = torch.zeros_like(table)
    state.setdefault("step", torch.zeros((), dtype=torch.float32))
    state["step"] += 1
    for rows in touched_rows(grad):
        _update_rows(table, grad[rows], rows, group, state)


def _update_rows(
    table: Tensor, grad: Tensor, rows: Tensor, group: dict[str, Any], state: dict[str, Tensor]
) -> None:
    """AdamW on these rows (u,); grad (u, V)."""
    beta1, beta2 = group["betas"]
    learning_rate, step = float(group["lr"]), float(state["step"])
    mean = state["exp_avg"][rows].lerp_(grad, 1 - beta1)
    square = state["exp_avg_sq"][rows].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = (square.sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
    values = table[rows].mul_(1 - learning_rate * group["weight_decay"])
    values.addcdiv_(mean, root, value=-learning_rate / (1 - beta1**step))
    for whole, part in ((state["exp_avg"], mean), (state["exp_avg_sq"], square), (table, values)):
        whole.index_copy_(0, rows, part)
