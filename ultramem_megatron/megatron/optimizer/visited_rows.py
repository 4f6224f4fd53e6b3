"""The Upkeep of a table of which AdamW visits rows that are read, wherever its moments are.

N table rows, V value dim.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.kernels.adam_rows import AdamRows, AnyMoments
from ultramem_megatron.kernels.reading import UPKEEP
from ultramem_megatron.memory.tables.value_table import ValueTable


class VisitedRows(ABC):
    """See kernels.reading.Upkeep."""

    def __init__(self, table: ValueTable) -> None:
        self.weight = table.weight
        self._rows = AdamRows(len(self.weight), self.weight.device)
        setattr(self.weight, UPKEEP, self)
        table.register_state_dict_pre_hook(lambda *_: self.catch_up())
        table.register_load_state_dict_pre_hook(lambda *_: self.catch_up())

    @torch.no_grad()
    def read(self, rows: Tensor) -> None:
        """See Upkeep."""
        self._rows.read(self._moments() if self._rows.begun else None, rows)

    @torch.no_grad()
    def catch_up(self) -> None:
        """See Upkeep."""
        if self._rows.begun:
            self._rows.catch_up(self._moments())

    @abstractmethod
    def _moments(self) -> AnyMoments:
        """What AdamW reads and writes, each (N, V)."""


def make_state(state: dict[str, Any], trained: Tensor) -> None:
    """Make the `state` of `trained`, where there is none, as AdamW does at its first step."""
    for name in ("exp_avg", "exp_avg_sq"):
        if name not in state:
            state[name] = torch.zeros_like(trained, dtype=torch.float32)
    state.setdefault("step", torch.zeros((), dtype=torch.float32))


def begin_step(state: dict[str, Any], trained: Tensor) -> int:
    """Count a step in the `state` of `trained`, and make it at the first."""
    make_state(state, trained)
    return count_step(state)


def count_step(state: dict[str, Any]) -> int:
    """The number of a step, from 1."""
    state.setdefault("step", torch.zeros((), dtype=torch.float32))
    state["step"] += 1
    return int(state["step"])


def refuse_other_optimizers(optimizer: torch.optim.Optimizer, given: str) -> None:
    """Raise UltraMemError where `given`, a flag, does not find PyTorch's AdamW."""
    if not isinstance(optimizer, torch.optim.AdamW):
        raise UltraMemError(
            f"{given} works with PyTorch's AdamW; the optimizer here is "
            f"{type(optimizer).__name__} (Megatron takes Transformer Engine's or Apex's where they "
            f"are installed, and Adam with --no-decoupled-weight-decay). Drop the flag: every step "
            f"then visits every row, with the same result."
        )
