"""Reads of each value as a histogram and of the key grid as a picture, for TensorBoard and W&B.

N values of a table, B bins on each side of the key grid, K buckets of the histogram.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ultramem_megatron.megatron.metrics import tensorboard_tag
from ultramem_megatron.megatron.reads_of_values import ReadsOfValues
from ultramem_megatron.memory.spans import Span

_BOUNDS = [2**power for power in range(32)]
_LIMITS = [0.5, *(2.0 * bound - 0.5 for bound in _BOUNDS)]
"""Upper limits of the K buckets: values that were read 0, 1, 2-3, 4-7, ... times."""
_PICTURE_SIDE = 256  # pixels, at least: a small grid is drawn with larger dots


class Usage(NamedTuple):
    """Reads of one memory layer since the log line before."""

    buckets: list[float]
    """(K,) values by how often they were read."""
    least: float
    most: float
    reads: float
    squares: float
    """Sum over values of the squared number of reads."""
    grid: Tensor
    """(B, B) reads, row keys by column keys."""


class UsagePictures:
    """Keeps what the layers of this rank saw, and brings it to the rank that writes."""

    def __init__(self, spans: Sequence[Span], bins: int, pipeline_group: Any) -> None:
        """bins: B. pipeline_group: the stages."""
        self.spans, self.bins, self.pipeline_group = spans, bins, pipeline_group
        self._kept: dict[int, Tensor] = {}

    def keep(self, layer_number: int, reads: ReadsOfValues, grid: Tensor) -> None:
        """Reads per value and of the grid (B, B), already summed over the ranks; a collective."""
        buckets, least, most = reads.histogram(torch.tensor(_BOUNDS, device=grid.device))
        ends = torch.stack([least, most]).double()
        sums = ends.new_tensor([reads.reads, reads.figures.squares])
        self._kept[layer_number] = torch.cat([buckets, ends, sums, grid.flatten().double()])

    def collect(self) -> dict[int, Usage]:
        """By layer number, the same on every rank; a collective over the stages."""
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        width = len(_LIMITS) + 4 + self.bins**2
        table = torch.zeros(len(self.spans), width, dtype=torch.float64, device=device)
        for row, span in enumerate(self.spans):
            if span.start in self._kept:
                table[row] = self._kept.pop(span.start)
        dist.all_reduce(table, group=self.pipeline_group)
        return {span.start: self._usage(table[row]) for row, span in enumerate(self.spans)}

    def _usage(self, row: Tensor) -> Usage:
        buckets, sums, grid = row.split([len(_LIMITS), 4, self.bins**2])
        least, most, reads, squares = sums.tolist()
        square = grid.view(self.bins, self.bins).cpu()
        return Usage(buckets.tolist(), least, most, reads, squares, square)


def write(usage: Usage, layer_number: int, iteration: int, tensorboard: Any, wandb: Any) -> None:
    """To the writers that this rank has, None for those that it has not."""
    histogram = tensorboard_tag(layer_number, "reads per value")
    grid = tensorboard_tag(layer_number, "key grid")
    shown = picture(usage.grid)
    last = max(k for k, number in enumerate(usage.buckets) if number) + 1
    if tensorboard:
        tensorboard.add_histogram_raw(
            histogram,
            min=usage.least,
            max=usage.most,
            num=sum(usage.buckets),
            sum=usage.reads,
            sum_squares=usage.squares,
            bucket_limits=_LIMITS[:last],
            bucket_counts=usage.buckets[:last],
            global_step=iteration,
        )
        tensorboard.add_image(grid, shown, iteration, dataformats="HW")
    if wandb:
        bars = (usage.buckets[:last], [-0.5, *_LIMITS[:last]])
        shapes = {histogram: wandb.Histogram(np_histogram=bars), grid: wandb.Image(shown)}
        wandb.log(shapes, iteration)


def picture(grid: Tensor) -> Any:
    """uint8 array, rows down and columns across: black was never read, white most, in logs."""
    brightness = grid.log1p() / grid.max().log1p().clamp(min=1)
    dots = -(-_PICTURE_SIDE // len(grid))
    large = brightness.repeat_interleave(dots, 0).repeat_interleave(dots, 1)
    return (255 * large).round().to(torch.uint8).numpy()
