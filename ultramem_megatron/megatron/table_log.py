"""--ultramem-log-tables-interval: what is logged of value tables beside the usual figures."""

from collections.abc import Mapping
from typing import Any

from ultramem_megatron.megatron import usage_pictures
from ultramem_megatron.megatron.table_steps import TableSteps
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.layer import UltraMemLayer
from ultramem_megatron.memory.retrieval.addresses import grid_bins


class TableLog:
    """Pictures of the reads, and how far the optimizer moves the tables, every so many steps."""

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
        self.interval = interval
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

    def is_due(self, iteration: int) -> bool:
        """Whether the tables are logged at this step."""
        return iteration % self.interval == 0

    def watch(self, optimizer: Any, _model_chunks: list[Any]) -> None:
        """See TableSteps.watch."""
        self.steps.watch(optimizer)

    def write_pictures(self, iteration: int, tensorboard: Any, wandb: Any) -> None:
        """To the writers of this rank, None for what it has not; a collective."""
        for number, usage in self.pictures.collect().items():
            usage_pictures.write(usage, number, iteration, tensorboard, wandb)

    def _present_step_is_due(self) -> bool:
        from megatron.training import get_args

        return self.is_due(get_args().curr_iteration + 1)
