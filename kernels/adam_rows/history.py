"""The last steps of AdamW, which a row that had no gradient has still to make."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

SLOTS = 1024
"""Steps that are kept; no row falls behind by as many."""


class AdamStep(NamedTuple):
    """What one step of AdamW takes beside gradients; number: of the step, from 1 (its bias)."""

    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    number: int

    @classmethod
    def of(cls, group: Mapping[str, Any], number: int) -> Self:
        """The step that torch.optim.AdamW makes with this parameter group."""
        beta1, beta2 = map(float, group["betas"])
        rates = float(group["lr"]), float(group["weight_decay"])
        return cls(*rates, beta1, beta2, float(group["eps"]), number)


class History:
    """Steps 1..count since it began, of which it keeps the last SLOTS."""

    def __init__(self, device: torch.device) -> None:
        self.count = 0
        self.numbers = torch.zeros(SLOTS, 8, device=device)
        """Of step n in row n % SLOTS, as native.cpp names them; rounded as PyTorch's kernel for
        this kind of device rounds them."""
        self._steps: list[AdamStep | None] = [None] * SLOTS

    def __getitem__(self, step: int) -> AdamStep:
        """Step 1..count, if it is kept."""
        found = self._steps[step % SLOTS]
        assert found is not None
        return found

    def append(self, step: AdamStep) -> None:
        """Make it step count + 1."""
        before = self[self.count] if self.count else step
        self.count += 1
        self._steps[self.count % SLOTS] = step
        rounded = _on_gpu if self.numbers.is_cuda else _on_cpu
        numbers = rounded(step, self.numbers.device)
        numbers.append(torch.full_like(numbers[0], growth(before, step)))
        self.numbers[self.count % SLOTS] = torch.stack(numbers)


def growth(before: AdamStep, step: AdamStep) -> float:
    """By what |update| / |value| can grow at most from one step without gradient to the next.

    The mean shrinks by beta1, the square's root by no more than sqrt(beta2), the value decays; the
    rest is the learning rate's and the bias corrections'. Infinite where nothing is said.
    """
    shrinks = 1 - step.lr * step.weight_decay
    if step.eps <= 0 or before.lr <= 0 or shrinks <= 0 or step.beta2 <= 0:
        return math.inf
    size = [s.lr / (1 - s.beta1**s.number) for s in (before, step)]
    root = [math.sqrt(1 - s.beta2**s.number) for s in (before, step)]
    smaller = step.beta1 / math.sqrt(step.beta2) / shrinks
    return smaller * size[1] / size[0] * root[1] / root[0] * (1 + 1e-6)  # 1e-6: what rounding adds


def _on_cpu(step: AdamStep, device: torch.device) -> list[Tensor]:
    """PyTorch computes them in float64, and rounds."""
    lr, weight_decay, beta1, beta2, eps, number = step
    correction = math.sqrt(1 - beta2**number)
    size = lr / (1 - beta1**number)
    numbers = (1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, correction, eps, size)
    return list(torch.tensor(numbers, dtype=torch.float64, device=device))


def _on_gpu(step: AdamStep, device: torch.device) -> list[Tensor]:
    """There it computes them on the GPU in float32; beta1 and beta2 in the place of weights.

    All go there at once: the host waits for each transfer.
    """
    given = torch.tensor([*step, 0.0], dtype=torch.float32).to(device)
    lr, weight_decay, beta1, beta2, eps, number, nothing = given.unbind()
    correction = (1 - beta2.pow(number)).sqrt()
    size = lr / (1 - beta1.pow(number))
    return [lr * weight_decay, beta1, beta2, nothing, correction, eps, size]
