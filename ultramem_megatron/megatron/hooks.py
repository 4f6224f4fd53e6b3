"""What a model with memories does inside Megatron's pretrain(), hung on its doors.

`patches/doors/` gives pretrain() callbacks and knows no memories; here are the functions that the
model builder hangs on them, for the model it has built, in the place of those of the one before.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ultramem_megatron.megatron.checkpoint.finite_state import search_what_it_loads
from ultramem_megatron.megatron.megatron_fsdp import place_tables, sum_over_all_ranks
from ultramem_megatron.megatron.metrics import (
    MemoryMonitor,
    collapse_warning,
    console_line,
    tensorboard_tag,
)
from ultramem_megatron.megatron.optimizer.host_tables import train_on_host
from ultramem_megatron.megatron.optimizer.row_adam import visit_touched_rows
from ultramem_megatron.megatron.optimizer.train_rows import move_touched_rows
from ultramem_megatron.megatron.optimizer.value_learning_rate import (
    ValueLearningRateScheduler,
    throw_warning,
    value_overrides,
)
from ultramem_megatron.megatron.table_log import TableLog
from ultramem_megatron.megatron.table_pages import ask_for_table_pages
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.layer import memory_layers
from ultramem_megatron.memory.size import memory_size, training_flops
from ultramem_megatron.memory.tables.value_table import is_value_table
from ultramem_megatron.patches.doors import (
    flops,
    footprint,
    fsdp_dtensor_state,
    optimizer_built,
    optimizer_config,
    training_log,
)

_BILLION = 10**9
_FIRST_WARNING = 20  # optimizer steps
_hung: list[tuple[list[Any], Any]] = []


@dataclass
class MemoryHooks:
    """The functions of one model. fullest_stage: memories on the stage that has most of them.

    replaced: elements of an MLP in whose place each memory stands, which Megatron counts.
    """

    ultramem: UltraMemConfig
    hidden_size: int
    table_ranks: int
    fullest_stage: int
    monitor: MemoryMonitor
    replaced: int = 0
    moves_few_rows: bool = False
    """--ultramem-train-rows."""
    table_log: TableLog | None = None
    scheduler: ValueLearningRateScheduler | None = None
    warned: set[int] = field(default_factory=set)
    """Layers whose memory was said to have collapsed."""

    def hang(self) -> None:
        """Hang all of them, beside those of every model."""
        doors: tuple[tuple[list[Any], Any], ...] = (
            (training_log.after, self.report),
            (optimizer_config.overrides, self.overrides),
            (optimizer_config.schedulers, self.make_scheduler),
            (optimizer_built.after, self.visit_rows),
            (optimizer_built.after, sum_over_all_ranks),
            (optimizer_built.after, ask_for_table_pages),
            (flops.more, self.flops),
            (footprint.more, self.footprint),
            (fsdp_dtensor_state.changes, place_tables),
        )
        if self.table_log is not None:  # before gradients are taken away
            doors = ((optimizer_built.after, self.table_log.watch), *doors)
        for door, function in doors:
            _hang(door, function)

    def report(self, iteration: int) -> None:
        """Metrics follow Megatron's own log line and go to the same writers; a collective."""
        from megatron.training import (
            get_args,
            get_tensorboard_writer,
            get_wandb_writer,
            print_rank_last,
        )

        if iteration % get_args().log_interval:
            return
        tables = self.table_log
        if tables is not None and not tables.is_due(iteration):
            tables = None
        by_layer = self.monitor.collect(None if tables is None else tables.pictures.keep)
        if tables is not None:
            for layer, metrics in tables.scalars().items():
                by_layer[layer] |= metrics
        scalars = {
            tensorboard_tag(layer, name): value
            for layer, metrics in by_layer.items()
            for name, value in metrics.items()
            if not math.isnan(value)
        }
        rate = None if self.scheduler is None else self.scheduler.value_learning_rate()
        shared = {} if rate is None else {"value learning rate": rate}
        if rate is not None:
            scalars["ultramem/value-learning-rate"] = rate
        for layer, metrics in by_layer.items():
            print_rank_last(console_line(layer, {**metrics, **shared}))
        self.warn(iteration, by_layer)
        writer, wandb_writer = get_tensorboard_writer(), get_wandb_writer()
        if writer:
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, iteration)
        if wandb_writer:
            wandb_writer.log(scalars, iteration)
        if tables is not None:
            tables.write_pictures(iteration, writer, wandb_writer)

    def warn(self, iteration: int, by_layer: Mapping[int, Mapping[str, float]]) -> None:
        """Say once of each memory that it has collapsed; not of the first steps, which may pass."""
        from megatron.training import get_args, print_rank_last

        args = get_args()
        tokens = args.log_interval * args.global_batch_size * args.seq_length
        reads_per_value = tokens * self.ultramem.picks / self.ultramem.num_values
        if iteration < _FIRST_WARNING:
            return
        for layer in by_layer.keys() - self.warned:
            warning = collapse_warning(layer, by_layer[layer], reads_per_value)
            if warning:
                self.warned.add(layer)
                print_rank_last(warning)

    def overrides(self) -> dict[Any, dict[str, Any]]:
        """The value tables' parameter group."""
        return value_overrides(self.ultramem)

    def make_scheduler(self, *args: Any, **kwargs: Any) -> ValueLearningRateScheduler:
        """The scheduler that lets the value tables' rate fall."""
        self.scheduler = ValueLearningRateScheduler(
            *args,
            value_lr_decay=self.ultramem.value_lr_decay,
            value_lr_fixed=self.ultramem.value_lr_fixed,
            **kwargs,
        )
        from megatron.training import get_args, print_rank_0

        batch = get_args().global_batch_size  # Megatron counts steps of schedules in samples
        warning = throw_warning(
            self.ultramem, self.scheduler.max_lr, self.scheduler.lr_warmup_steps / batch
        )
        if warning:
            print_rank_0(warning)
        return self.scheduler

    def visit_rows(self, optimizer: Any, model_chunks: list[Any]) -> None:
        """With --ultramem-row-adam AdamW visits the rows of value tables that are read.

        So it does with tables in host memory (--ultramem-table-memory host), of which it sees what
        stands for them. With --ultramem-train-rows, which clears the gradients of most, others are
        left alone.
        """
        layers = [layer for chunk in model_chunks for layer in memory_layers(chunk)]
        without_copy = self.ultramem.table_main_params == "none"
        kept = (self.ultramem.table_moments, self.ultramem.seed if without_copy else None)
        train_on_host(optimizer, layers, *kept)
        if self.ultramem.row_adam:
            visit_touched_rows(optimizer, layers, *kept)
        if not self.moves_few_rows:
            return
        # Half precision trains a float32 copy of each parameter.
        tables = [
            getattr(parameter, "main_param", parameter)
            for chunk in model_chunks
            for parameter in chunk.parameters()
            if is_value_table(parameter)
        ]
        for single in getattr(optimizer, "chained_optimizers", [optimizer]):
            if tables and single.optimizer is not None:
                move_touched_rows(single.optimizer, tables)

    def flops(self, tokens: int) -> int:
        """Of forward and backward through all memories, less the MLPs that they replace."""
        mlps = 3 * tokens * len(self.ultramem.spans) * 2 * self.replaced
        return training_flops(self.ultramem, self.hidden_size, tokens) - mlps

    def footprint(self, args: Any, verbose: bool) -> float:
        """Bytes of the memories on one rank of the fullest stage: weights, gradients, Adam."""
        size = memory_size(self.ultramem, self.hidden_size)
        if verbose:
            print(
                "Number of parameters in memory layers in billions: "
                f"sparse {size.sparse / _BILLION:.4f}, dense {size.dense / _BILLION:.4f} "
                "(not in the totals above)"
            )
        share = self.fullest_stage / len(self.ultramem.spans)
        # Everything but the tables is whole on every tensor-parallel rank.
        held = size.sparse / self.table_ranks + size.dense
        held -= len(self.ultramem.spans) * self.replaced / args.tensor_model_parallel_size
        return share * held * footprint.bytes_per_parameter(args)


def hang_for_every_model() -> None:
    """What a model without memories gets as well; hooks of a model before are taken off."""
    take_off()
    _hang(optimizer_built.after, search_what_it_loads)


def _hang(door: list[Any], function: Any) -> None:
    door.append(function)
    _hung.append((door, function))


def take_off() -> None:
    """Leave the doors as they were before a model was built."""
    while _hung:
        door, function = _hung.pop()
        door.remove(function)
