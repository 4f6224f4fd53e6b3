"""Per-layer metrics of memories: summed up on the device in each step, reduced at log intervals.

Scores are the weights of values, averaged over tokens and cores; usage counts reads of physical
values since the last report.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ultramem_megatron.megatron.reads_of_values import ReadsOfValues
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.layer import UltraMemLayer
from ultramem_megatron.memory.retrieval import RETRIEVALS
from ultramem_megatron.memory.retrieval.addresses import grid_bins

METRICS = (
    "top-1 score",  # mean score of each head's best value
    "top-m score",  # mean score of all selected values
    "output std",  # of the memory's result, before it joins the residual stream
    "query cosine",  # between different tokens' queries; near 1 they all read the same values
    "values used",  # share of physical values read at least once
    "usage KL",  # KL divergence of the reads from uniform, nats; 0 is perfectly even
)
"""Of every memory; its retrieval adds its own."""
_ALIKE, _HARDLY_USED = 0.9, 0.01
KeepReads = Callable[[int, ReadsOfValues, Tensor], None]
"""Takes a layer's number, its reads and those of the key grid, over all ranks of its stage."""


class MemoryMonitor:
    """Reads the statistics of the memory layers on this rank and reduces them over all ranks."""

    def __init__(
        self,
        layers: Mapping[int, UltraMemLayer],
        ultramem: UltraMemConfig,
        *,
        data_group: dist.ProcessGroup,
        pipeline_group: dist.ProcessGroup,
    ) -> None:
        """layers: by layer number, those on this rank. data_group: ranks that see other tokens
        with the same layers (data and context parallel). pipeline_group: the other stages.
        """
        self.layers = layers
        self.spans = ultramem.spans
        self.names = (*METRICS, *RETRIEVALS[ultramem.retrieval].reports)
        self.data_group = data_group
        self.pipeline_group = pipeline_group

    @torch.no_grad()
    def collect(self, keep_reads: KeepReads | None = None) -> dict[int, dict[str, float]]:
        """Metrics by layer number since the last call, the same on every rank; a collective.

        What does not apply is NaN.
        """
        # A stage without memories takes part too, so the device is not taken from a layer.
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        table = torch.zeros(len(self.spans), len(self.names), dtype=torch.float64, device=device)
        for row, span in enumerate(self.spans):
            if span.start in self.layers:
                table[row] = self._of_layer(self.layers[span.start], keep_reads)
        dist.all_reduce(table, group=self.pipeline_group)
        return {
            span.start: dict(zip(self.names, table[row].tolist(), strict=True))
            for row, span in enumerate(self.spans)
        }

    def _of_layer(self, layer: UltraMemLayer, keep_reads: KeepReads | None) -> Tensor:
        forwards, sums, hits = layer.statistics.take()
        grid = layer.statistics.take_grid()
        device = layer.query.proj.weight.device
        totals = torch.zeros(6, dtype=torch.float64, device=device)
        if sums is not None and hits is not None:
            totals[:-2], totals[-2], totals[-1] = sums.double(), forwards, hits.sum()
        dist.all_reduce(totals, group=self.data_group)
        reads = ReadsOfValues(
            hits, layer.statistics.counters, float(totals[-1]), device, self.data_group
        )
        if keep_reads is not None:
            bins = grid_bins(layer.config.keys_per_side)
            grids = torch.zeros(bins, bins, dtype=torch.int64, device=device)
            grids += 0 if grid is None else grid
            dist.all_reduce(grids, group=self.data_group)
            keep_reads(layer.layer_number, reads, grids)
        means = totals[:-2] / totals[-2]
        tail = [reads.figures.used, reads.figures.divergence, *layer.retrieval.report().values()]
        return torch.cat([means, torch.tensor(tail, dtype=torch.float64, device=device)])


def collapse_warning(
    layer_number: int, metrics: Mapping[str, float], reads_per_value: float
) -> str | None:
    """A line for a memory whose tokens all read the same few values, with what to do; or None.

    metrics: of `MemoryMonitor.collect`. reads_per_value: in the same time, over all ranks; with
    less than one, few values used say nothing.
    """
    cosine, used = metrics["query cosine"], metrics["values used"]
    if not (cosine > _ALIKE or (used < _HARDLY_USED and reads_per_value >= 1)):
        return None
    return (
        f"WARNING: the memory of layer {layer_number} reads {used:.2%} of its values; queries of "
        f"different tokens have a cosine of {cosine:.2f}. It will hardly help until they differ: "
        f"start with --ultramem-init matched and --ultramem-query-centering (both default), a "
        f"longer --lr-warmup-iters, or a lower --ultramem-value-lr-mult."
    )


def console_line(layer_number: int, metrics: Mapping[str, float]) -> str:
    """One line of the training log, in Megatron's style; metrics that do not apply are left out."""
    parts = [f"{name}: {value:.4E}" for name, value in metrics.items() if not math.isnan(value)]
    return f" ultramem layer {layer_number:3d} | " + " | ".join(parts) + " |"


def tensorboard_tag(layer_number: int, name: str) -> str:
    """Tag of a metric: one chart per metric and layer, grouped under `ultramem`."""
    return f"ultramem/{name.replace(' ', '-')}/layer-{layer_number:03d}"
