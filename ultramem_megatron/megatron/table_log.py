"""--ultramem-log-tables-interval: what is logged of value tables beside the usual figures."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from ultramem_megatron.megatron import usage_pictures
from ultramem_megatron.megatron.table_steps import TableSteps
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.layer import UltraMemLayer
from ultramem_megatron.memory.retrieval.addresses import grid_bins

RECALL = "filter recall"
"""Share of the best pairs within the filter's reach that it lets through."""


class TableLog:
    """Pictures of the reads, what the filter misses, how far the optimizer moves the tables."""

    def __init__(
        self,
        interval: int,
        layers: Mapping[int, UltraMemLayer],
        ultramem: UltraMemConfig,
        *,
        stage_group: Any,
        pipeline_group: Any,
    ) -> None:
        """layers: by number, those on this rank. stage_group: all ranks with the same layers."""
        self.interval, self.layers, self.spans = interval, layers, ultramem.spans
        self.groups = (stage_group, pipeline_group)
        bins = grid_bins(ultramem.keys_per_side)
        self.pictures = usage_pictures.UsagePictures(ultramem.spans, bins, pipeline_group)
        self.steps = TableSteps(
            layers,
            ultramem.spans,
            self._present_step_is_due,
            stage_group=stage_group,
            pipeline_group=pipeline_group,
        )
        for layer in layers.values():
            layer.statistics.keys_per_side = ultramem.keys_per_side
            layer.statistics.wants_recall = True

    def is_due(self, iteration: int) -> bool:
        """Whether the tables are logged at this step."""
        return iteration % self.interval == 0

    def watch(self, optimizer: Any, _model_chunks: list[Any]) -> None:
        """See TableSteps.watch."""
        self.steps.watch(optimizer)

    def scalars(self) -> dict[int, dict[str, float]]:
        """By layer number, since the last time, what does not apply is NaN; a collective."""
        steps, recall = self.steps.collect(), self._recall()
        return {number: found | {RECALL: recall[number]} for number, found in steps.items()}

    def write_pictures(self, iteration: int, tensorboard: Any, wandb: Any) -> None:
        """To the writers of this rank, None for what it has not; a collective."""
        for number, usage in self.pictures.collect().items():
            usage_pictures.write(usage, number, iteration, tensorboard, wandb)

    def _recall(self) -> dict[int, float]:
        """Of the first tokens that each rank saw after the tables were logged before."""
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        table = torch.zeros(len(self.spans), 2, dtype=torch.float64, device=device)
        for row, span in enumerate(self.spans):
            layer = self.layers.get(span.start)
            found = None if layer is None else layer.statistics.take_recall()
            if found is not None and not found.isnan():
                table[row, 0], table[row, 1] = found, 1
        for group in self.groups:
            dist.all_reduce(table, group=group)
        return {
            span.start: float(table[row, 0] / table[row, 1]) for row, span in enumerate(self.spans)
        }

    def _present_step_is_due(self) -> bool:
        from megatron.training import get_args

        return self.is_due(get_args().curr_iteration + 1)
