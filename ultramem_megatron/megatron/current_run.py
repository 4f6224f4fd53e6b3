"""What the patched functions of Megatron need to know of the model being trained.

Megatron calls them without the model, so the model builder leaves it here.
"""

from dataclasses import dataclass, field

from ultramem_megatron.megatron.metrics import MemoryMonitor
from ultramem_megatron.megatron.optimizer.value_learning_rate import ValueLearningRateScheduler
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.tables.settings import TableSettings


@dataclass
class CurrentRun:
    """Design and monitor of the model last built in this process; None for a plain GPT."""

    ultramem: UltraMemConfig | None = None
    hidden_size: int = 0
    memories_on_fullest_stage: int = 0
    tables: TableSettings = field(default_factory=TableSettings)
    monitor: MemoryMonitor | None = None
    scheduler: ValueLearningRateScheduler | None = None

    def value_learning_rate(self) -> float | None:
        """The value tables' present learning rate, if they have one of their own."""
        return None if self.scheduler is None else self.scheduler.value_learning_rate()


current_run = CurrentRun()
