"""What plan --fit prints."""

import argparse
import itertools
import shlex
from collections.abc import Sequence

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.tools.plan.build import Run, command_line, parse
from ultramem_megatron.tools.plan.fit import (
    accepted,
    counts_of,
    fit,
    layout_words,
    smallest_that_fits,
    work_of,
)
from ultramem_megatron.tools.plan.fit_counts import Counts
from ultramem_megatron.tools.plan.fit_model import Machine, Prediction, Work

_COLUMNS = (
    f"  {'TP':>3}{'PP':>4}{'CP':>4}{'DP':>6}{'tables':>16}{'batch':>7}{'recompute':>11}{'GB':>8}"
    f"{'step s':>11}{'compute':>11}{'tables':>11}{'Adam':>11}{'exposed exchange':>24}  bound by"
)


def found_and_shown(preset: str | None, flags: Sequence[str], options: argparse.Namespace) -> str:
    """The table of a model's layouts. Raises UltraMemError if nothing fits."""
    words = command_line(preset, flags)
    run = parse(words)
    work, machine = work_of(run), machine_of(options)
    counts = counts_of(words, machine.node, machine.gpus)
    found = fit(run, counts, work, machine)
    shown = list(itertools.islice(accepted(words, run, found.fitting, machine), options.top))
    if not shown:
        raise UltraMemError(_nothing(run, counts, work, machine, found.least))
    return "\n".join([*_table(shown, work, machine), *_flags(preset, shown[0], run, machine)])


def machine_of(options: argparse.Namespace) -> Machine:
    """From flags in GB/s and TFLOP/s."""
    return Machine(
        gpus=options.gpus[0],
        memory=options.memory * 1e9,
        node=options.node_size,
        node_bandwidth=options.bandwidth[0] * 1e9,
        network_bandwidth=options.bandwidth[1] * 1e9,
        flops=options.tflops * 1e12 * options.efficiency,
        memory_bandwidth=options.memory_bandwidth * 1e9,
    )


def _table(shown: Sequence[Prediction], work: Work, machine: Machine) -> list[str]:
    return [
        f"{machine.gpus} GPUs of {machine.memory / 1e9:g} GB, {machine.flops / 1e12:.4g} TFLOP/s "
        f"reached, {machine.node} to a node; global batch {work.sequences} x {work.length} tokens",
        "seconds of a step by a cost model, not measured, with --ultramem-overlap; GB without the "
        "peak inside a layer;",
        "exposed exchange: all collectives that nothing hides (in brackets: without the overlap)",
        _COLUMNS,
        *map(_line, shown),
    ]


def _line(each: Prediction) -> str:
    layout = each.layout
    tables = f"{layout.tables} {layout.partition}" if layout.tables > 1 else "whole"
    exposed = f"{each.communication - each.hidden:.4g} ({each.communication:.4g})"
    return (
        f"  {layout.tensor:>3}{len(layout.stages):>4}{layout.context:>4}{layout.data:>6}"
        f"{tables:>16}{layout.micro_batch:>7}{'full' if layout.recompute else 'none':>11}"
        f"{each.memory / 1e9:>8.1f}{each.seconds:>11.4g}{each.compute:>11.4g}{each.tables:>11.3g}"
        f"{each.optimizer:>11.3g}{exposed:>24}  {each.bound}"
    )


def _flags(preset: str | None, best: Prediction, run: Run, machine: Machine) -> list[str]:
    words = layout_words(run, best.layout, machine.gpus)
    words += ["--ultramem-overlap"] * (best.hidden > 0)
    counted = " ".join(
        filter(None, ("ultramem plan", preset, f"--gpus {machine.gpus} <your flags> <these>"))
    )
    return ["", "flags of the first:", f"  {shlex.join(words)}", f"counted exactly by: {counted}"]


def _nothing(
    run: Run, counts: Sequence[Counts], work: Work, machine: Machine, least: Prediction
) -> str:
    layout = least.layout
    larger = smallest_that_fits(run, counts, work, machine)
    enough = "no number of GPUs does" if larger is None else f"{larger} GPUs of this size do"
    return (
        f"Nothing fits --gpus {machine.gpus} with --memory {machine.memory / 1e9:g}: the least is "
        f"{least.memory / 1e9:.3g} GB a GPU (tensor {layout.tensor}, pipeline "
        f"{len(layout.stages)}, context {layout.context}, tables over {layout.tables}, recompute "
        f"{'full' if layout.recompute else 'none'}, micro-batch {layout.micro_batch}). Doubling, "
        f"{enough} with --global-batch-size {work.sequences}."
    )
