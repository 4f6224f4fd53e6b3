"""How far a step moves the value tables: norm of their gradient, and |update| / |weights|.

Measured where the optimizer steps, on whatever part of a table this rank's optimizer holds: all of
it, a part of rows or columns, under the distributed optimizer a piece of those. Sums over all ranks
of a stage count a replicated element as often as its weight, so it falls out of the quotient.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ultramem_megatron.kernels.reading import about_to_read_all
from ultramem_megatron.memory.layer import UltraMemLayer
from ultramem_megatron.memory.spans import Span
from ultramem_megatron.memory.tables.value_table import value_tables

STEPS = ("table gradient norm", "table update ratio")
"""The gradient as the optimizer got it, after clipping; the update with its weight decay."""
_AT_ONCE = 2**22  # elements; what is compared on the device beside the table


class TableSteps:
    """Watches the optimizer at the steps that are due."""

    def __init__(
        self,
        layers: Mapping[int, UltraMemLayer],
        spans: Sequence[Span],
        is_due: Callable[[], bool],
        *,
        stage_group: Any,
        pipeline_group: Any,
    ) -> None:
        """layers: by number, those on this rank. is_due: whether to measure the present step."""
        self.layers, self.spans, self.is_due = layers, spans, is_due
        self.groups = (stage_group, pipeline_group)
        self._sums: dict[int, Tensor] = {}

    def watch(self, optimizer: Any) -> None:
        """To be called once, before the first step and before what else changes gradients."""
        for single in getattr(optimizer, "chained_optimizers", [optimizer]):
            if single.optimizer is not None:
                _Watched(self, single)

    def add(self, table: Tensor, sums: Tensor) -> None:
        """sums (4,): squares of gradient, update and weights, elements; of a part of `table`."""
        for number, layer in self.layers.items():
            if any(table is values.weight for values in value_tables(layer).values()):
                self._sums[number] = self._sums.get(number, 0) + sums

    def collect(self) -> dict[int, dict[str, float]]:
        """By layer number, the same on every rank, NaN without a step since; a collective."""
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        table = torch.zeros(len(self.spans), 5, dtype=torch.float64, device=device)
        for row, span in enumerate(self.spans):
            if span.start in self._sums:
                size = sum(
                    values.layout.num_values * values.layout.value_dim
                    for values in value_tables(self.layers[span.start]).values()
                )
                table[row, :4] = self._sums[span.start]
                table[row, 4] = self._sums[span.start][3] * size
        self._sums.clear()
        for group in self.groups:
            dist.all_reduce(table, group=group)
        return {span.start: _named(table[row]) for row, span in enumerate(self.spans)}


def _named(sums: Tensor) -> dict[str, float]:
    gradient, update, weights, elements, elements_times_size = sums
    size = elements_times_size / elements
    found = ((gradient / elements * size).sqrt(), (update / weights).sqrt())
    return dict(zip(STEPS, map(float, found), strict=True))


class _Watched:
    """One torch optimizer, between the hooks before and after its step."""

    def __init__(self, steps: TableSteps, single: Any) -> None:
        """single: a MegatronOptimizer."""
        self.steps, self.single = steps, single
        self.before: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        single.optimizer.register_step_pre_hook(self._before_step)
        single.optimizer.register_step_post_hook(self._after_step)

    @torch.no_grad()
    def _before_step(self, *_: Any) -> None:
        if not self.steps.is_due():
            return
        tables = [
            values.weight
            for layer in self.steps.layers.values()
            for values in value_tables(layer).values()
        ]
        for table, part in trained_parts(self.single, {id(table): table for table in tables}):
            if part.grad is not None:
                about_to_read_all(table)
                # In host memory: beside a table there may be no room for its like.
                copy = part.detach().to("cpu", copy=True)
                self.before.append((table, part, copy, _square(part.grad)))

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        for table, part, before, gradient in self.before:
            about_to_read_all(table)
            sums = torch.zeros(4, dtype=torch.float64, device=part.device)
            sums[0], sums[3] = gradient, part.numel()
            pieces = (whole.flatten().split(_AT_ONCE) for whole in (part, before))
            for now, then in zip(*pieces, strict=True):
                old = then.to(now.device)
                sums[1] += _square(now - old)
                sums[2] += _square(old)
            self.steps.add(table, sums)
        self.before.clear()


def _square(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float64).square()


def trained_parts(single: Any, tables: Mapping[int, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each table, and what the optimizer trains of it: float32, with a gradient."""
    if hasattr(single, "shard_fp32_groups"):  # the distributed optimizer
        models = chain(*single.model_fp32_groups, *single.model_float16_groups)
        parts = chain(*single.shard_fp32_groups, *single.shard_fp32_from_float16_groups)
        yield from ((m, p) for m, p in zip(models, parts, strict=True) if id(m) in tables)
        return
    held = {id(p) for group in single.optimizer.param_groups for p in group["params"]}
    for table in tables.values():
        part = getattr(table, "main_param", table)
        if id(part) in held:
            yield table, part
