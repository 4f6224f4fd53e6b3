"""Layouts of a model that fit a machine, the fastest first.

Every tensor, pipeline, context and table-parallel size, partition, micro-batch and full
recomputation that the flags' global batch can be divided by, each judged by `fit_stage.py`; those
that are shown have passed Megatron's and our own checks of flags.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.pipeline.layout import even_sizes, layout_flag, suggest_layout
from ultramem_megatron.memory.config import UltraMemConfig, flag
from ultramem_megatron.memory.placement import uncut
from ultramem_megatron.memory.tables.partitions import shared_partitions
from ultramem_megatron.memory.tables.settings import TableSettings
from ultramem_megatron.tools.plan.build import Run, parse
from ultramem_megatron.tools.plan.fit_counts import Counts, count
from ultramem_megatron.tools.plan.fit_model import Layout, Machine, Prediction, Work
from ultramem_megatron.tools.plan.fit_stage import predict
from ultramem_megatron.tools.plan.sizes import cached_per_token
from ultramem_megatron.tools.plan.stage_cost import gradient_bytes, optimizer_bytes

_MICRO_BATCHES = (1, 2, 4, 8, 16)
_SHORTEST_SHARE = 4096  # tokens of a sequence on a rank, below which it is not cut further
_MOST_GPUS = 2**20
_ALONE = ("--pipeline-model-parallel-size", "1", "--context-parallel-size", "1")


class Fit(NamedTuple):
    """fitting: fastest first, each in its fastest micro-batch. least: with the least memory."""

    fitting: list[Prediction]
    least: Prediction


def work_of(run: Run) -> Work:
    """What a step of these flags does. Raises UltraMemError for models that are not modelled."""
    args, transformer = run.args, run.transformer
    if args.num_experts:
        raise UltraMemError(
            "--fit does not model experts (--num-experts): lay them out yourself, and see what "
            "ultramem plan --gpus N says of it."
        )
    if args.recompute_granularity is not None:
        raise UltraMemError(
            f"--fit tries layouts with full recomputation and without: drop "
            f"--recompute-granularity {args.recompute_granularity}."
        )
    if run.tables_on_host:
        raise UltraMemError(
            "--fit does not model --ultramem-table-memory host: lay it out yourself, and see what "
            "ultramem plan --gpus N says of it."
        )
    for name in ("table_moments", "table_main_params"):
        kept = getattr(run.ultramem, name, "float32")
        if kept != "float32":
            raise UltraMemError(
                f"--fit does not model {flag(name)} {kept}: lay it out yourself, and see what "
                f"ultramem plan --gpus N says of it."
            )
    if getattr(args, "hybrid_layer_pattern", None):
        raise UltraMemError(
            "--fit does not model --hybrid-layer-pattern: lay it out yourself, and see what "
            "ultramem plan --gpus N says of it."
        )
    if getattr(args, "ultramem_train_only", None) is not None:
        raise UltraMemError(
            "--fit counts every weight as trained (--ultramem-train-only): lay it out yourself and "
            "see what ultramem plan --gpus N says of it."
        )
    return Work(
        sequences=args.global_batch_size,
        length=args.seq_length,
        hidden=args.hidden_size,
        number_bytes=transformer.params_dtype.itemsize,
        gradient_bytes=gradient_bytes(run),
        optimizer_bytes=optimizer_bytes(run),
        cached=cached_per_token(transformer) or 0,
        memory=run.ultramem,
        gradients_overlap=args.overlap_grad_reduce,
    )


def counts_of(words: Sequence[str], node: int, gpus: int) -> list[Counts]:
    """Of every tensor-parallel size within a node that divides `gpus` and that Megatron takes."""
    found, refusal = [], None
    for ranks in _powers(min(node, gpus)):
        if gpus % ranks:
            continue
        flags = ["--tensor-model-parallel-size", str(ranks), "--ultramem-parallel-size", "1"]
        flags += [*_ALONE, "--micro-batch-size", "1"]
        flags += ["--sequence-parallel"] * (ranks > 1)
        try:
            found.append(count(parse([*words, *flags], ranks)))
        except UltraMemError as error:  # heads that cannot be divided
            refusal = error
    if not found:
        assert refusal is not None
        raise refusal
    return found


def fit(run: Run, counts: Iterable[Counts], work: Work, machine: Machine) -> Fit:
    """All layouts, judged. Raises UltraMemError if the global batch can be divided by none."""
    found = [
        predict(of_tensor, work, machine, layout)
        for of_tensor in counts
        for layout in _layouts(run, work, machine, of_tensor.tensor_ranks)
    ]
    if not found:
        raise UltraMemError(
            f"--gpus {machine.gpus}: no layout divides --global-batch-size {work.sequences} evenly "
            f"among its data-parallel ranks. Use a global batch that is a multiple of them."
        )
    fitting = [each for each in found if each.memory <= machine.memory]
    fitting.sort(key=lambda each: (each.seconds, each.memory))
    of_layout: dict[Layout, Prediction] = {}
    for each in fitting:  # of micro-batches the fastest
        of_layout.setdefault(replace(each.layout, micro_batch=0), each)
    return Fit([*of_layout.values()], min(found, key=lambda each: each.memory))


def smallest_that_fits(
    run: Run, counts: Sequence[Counts], work: Work, machine: Machine
) -> int | None:
    """The number of GPUs, doubled until something fits; None: not with a million."""
    gpus = machine.gpus
    while (gpus := 2 * gpus) <= _MOST_GPUS:
        larger = replace(machine, gpus=gpus)
        try:
            if fit(run, counts, work, larger).fitting:
                return gpus
        except UltraMemError:
            return None
    return None


def _layouts(run: Run, work: Work, machine: Machine, tensor: int) -> Iterator[Layout]:
    spans = uncut(run.ultramem) if run.ultramem else ()
    layers, share = run.args.num_layers, machine.gpus // tensor
    if machine.gpus % tensor:
        return
    for stages, context in itertools.product(_divisors(share, layers), _contexts(work, share)):
        sizes = even_sizes(spans, layers, stages)
        if sizes is None or share % (stages * context):
            continue
        data = share // (stages * context)
        for micro_batch in _MICRO_BATCHES:
            if work.sequences % (micro_batch * data):
                continue
            plain = Layout(tensor, sizes, context, data, micro_batch=micro_batch)
            cuts = _cuts(run.ultramem, plain.stage_ranks, machine.node)
            for tables, recompute in itertools.product(cuts, (False, True)):
                yield Layout(
                    tensor,
                    sizes,
                    context,
                    data,
                    tables.size,
                    tables.partition,
                    recompute,
                    micro_batch,
                    tables.node_size,
                )


@cache
def _cuts(memory: UltraMemConfig | None, ranks: int, node: int) -> tuple[TableSettings, ...]:
    if memory is None:
        return (TableSettings(),)
    found: dict[tuple[int, int], TableSettings] = {}
    for size in _divisors(ranks, ranks):
        for partition in shared_partitions() if size > 1 else ("dimension",):
            settings = TableSettings(size, partition, node)
            with suppress(UltraMemError):
                settings.check(memory)
                # In one node, or in nodes of one rank, a grid is one of the others.
                found.setdefault(settings.kind.parts(size, settings.node), settings)
    return tuple(found.values())


def _contexts(work: Work, ranks: int) -> list[int]:
    most = max(1, min(ranks, work.length // _SHORTEST_SHARE))
    return [size for size in _powers(most) if work.length % (2 * size) == 0 or size == 1]


def _powers(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length())]


def _divisors(number: int, most: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted(d for d in {*small, *(number // d for d in small)} if d <= most)


def layout_words(run: Run, layout: Layout, gpus: int) -> list[str]:
    """Flags of Megatron's and ours for this layout."""
    words = ["--tensor-model-parallel-size", str(layout.tensor)]
    words += ["--sequence-parallel"] * (layout.tensor > 1)
    words += ["--pipeline-model-parallel-size", str(len(layout.stages))]
    if len(set(layout.stages)) > 1:
        spans = uncut(run.ultramem) if run.ultramem else ()
        suggested = suggest_layout(spans, run.transformer, len(layout.stages))
        words += [layout_flag(run.transformer), str(suggested)]
    words += ["--context-parallel-size", str(layout.context)]
    words += ["--micro-batch-size", str(layout.micro_batch)]
    words += ["--use-distributed-optimizer"] * (gpus > 1)
    if layout.recompute:
        words += ["--recompute-granularity", "full", "--recompute-method", "uniform"]
        words += ["--recompute-num-layers", "1"]
    if run.ultramem is not None:
        words += ["--ultramem-parallel-size", str(layout.tables)]
        words += ["--ultramem-partition", layout.partition] if layout.tables > 1 else []
        if layout.partition == "grid":
            words += ["--ultramem-node-size", str(layout.node_size)]
    return words


def accepted(
    words: Sequence[str], run: Run, found: Iterable[Prediction], machine: Machine
) -> Iterator[Prediction]:
    """Those whose flags Megatron and our own checks take."""
    for each in found:
        try:
            parse([*words, *layout_words(run, each.layout, machine.gpus)], machine.gpus)
        except UltraMemError:
            continue
        yield each
