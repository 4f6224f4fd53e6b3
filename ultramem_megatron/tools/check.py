"""Would these flags train? Everything that is checked before a training, without a GPU.

    ultramem check <flags of ultramem train>
    ultramem check --gpus 64 $(ultramem presets ultramem-1.6b-x12 --model --training) \\
        --tensor-model-parallel-size 2 --micro-batch-size 4 --data-path my_data ...

One line for each check; exit status 0 if the run would start, 2 if something is refused. Nothing
is trained or written: a login node will do.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ultramem_megatron.errors import CommandParser, UltraMemError, exit_on_user_error
from ultramem_megatron.tools.quiet import quiet


class Line(NamedTuple):
    """What one check found."""

    name: str
    passed: bool
    text: str


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each check; the exit status. Raises UltraMemError without flags."""
    parser = CommandParser(
        prog="ultramem check",
        usage="%(prog)s [--gpus N] <flags of ultramem train>",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="ranks (default: as few as the layout needs)"
    )
    options, flags = parser.parse_known_args(argv)
    if not flags:
        raise UltraMemError("Nothing to check: give the flags of ultramem train.")
    if options.gpus is not None and options.gpus < 1:
        raise UltraMemError(f"--gpus {options.gpus}: must be at least 1.")
    passed = True
    for line in checked(flags, options.gpus):
        passed &= line.passed
        print(f"{line.name:<12}{'ok' if line.passed else 'REFUSED':<9}{line.text}", flush=True)
    return 0 if passed else 2


def checked(flags: Sequence[str], gpus: int | None = None) -> Iterator[Line]:
    """Every check's line; when the flags themselves are refused there is none after it."""
    with quiet():
        from ultramem_megatron.tools.plan.build import parse, smallest_world

    try:
        with quiet():
            run = parse(flags, gpus or smallest_world(flags))
    except UltraMemError as error:
        yield Line("flags", False, str(error))
        return
    yield Line("flags", True, _groups(run))
    for name, check in _CHECKS.items():
        try:
            with quiet():
                text = check(run)
        except UltraMemError as error:
            yield Line(name, False, str(error))
        else:
            yield Line(name, True, text)


def _groups(run: Any) -> str:
    args = run.args
    return (
        f"{args.world_size} ranks: {args.tensor_model_parallel_size} tensor x {run.stages} "
        f"pipeline x {args.data_parallel_size} data; global batch {args.global_batch_size} x "
        f"{args.seq_length} tokens, {args.train_iters} steps"
    )


def _training(run: Any) -> str:
    from ultramem_megatron.megatron.flags.refusals import refuse_other_tasks, require_eval_interval
    from ultramem_megatron.megatron.flags.slips import refuse_slips_of_training

    refuse_other_tasks(run.args)
    require_eval_interval(run.args)
    refuse_slips_of_training(run.args)
    return f"validates every {run.args.eval_interval} steps on {run.args.eval_iters} global batches"


def _spans(run: Any) -> str:
    """The spans against the pipeline's stages; that they are layers of the model is checked."""
    from ultramem_megatron.megatron.pipeline.layout import (
        layout_flag,
        pipeline_chunks,
        spans_cross_stages,
        suggest_layout,
    )
    from ultramem_megatron.memory.placement import uncut

    if run.ultramem is None:
        return "none: a plain model"
    spans = "/".join(map(str, run.ultramem.spans))
    cut = f"{run.tables.partition}-wise over {run.tables.size} ranks"
    tables = f"{len(run.ultramem.spans)} at spans {spans}; tables " + (
        cut if run.tables.size > 1 else "whole on every rank"
    )
    if not spans_cross_stages(run.ultramem.spans, run.transformer):
        return f"{tables}; no span crosses a stage"
    better = suggest_layout(
        uncut(run.ultramem), run.transformer, len(pipeline_chunks(run.transformer))
    )
    advice = f', not so with {layout_flag(run.transformer)} "{better}"' if better else ""
    return f"{tables}; spans cross stages, which sends tensors twice as wide{advice}"


def _memory(run: Any) -> str:
    from ultramem_megatron.tools.plan.layouts import describe_layout

    if run.args.padded_vocab_size is None and run.args.vocab_size is None:
        raise UltraMemError("not known without the vocabulary: mend the tokenizer first.")
    stages = describe_layout(run)["stages"]
    fullest = max(stages, key=lambda stage: stage["memory"])
    parts = ", ".join(
        f"{fullest[key] / 1e9:.2f} {label}"
        for key, label in (
            ("parameters", "parameters"),
            ("gradients", "gradients"),
            ("optimizer", "optimizer"),
            ("activations", "activations"),
        )
    )
    host = max(stage["host"] for stage in stages)
    beside = f"; {host / 1e9:.2f} GB of tables in host memory" if host else ""
    return f"{fullest['memory'] / 1e9:.2f} GB on each rank of the fullest stage ({parts}){beside}"


def _data(run: Any) -> str:
    from megatron.training.utils import get_blend_and_blend_per_split

    from ultramem_megatron.data.check import check_data

    check_data(run.args)
    if run.args.mock_data:
        return "random mock data"
    blend, per_split = get_blend_and_blend_per_split(run.args)
    prefixes = {prefix for found in (blend, *(per_split or ())) if found for prefix in found[0]}
    return f"{len(prefixes)} data sets, whole: {', '.join(sorted(prefixes))}"


def _tokenizer(run: Any) -> str:
    from ultramem_megatron.data.open_tokenizer import open_tokenizer

    args = run.args
    tokens = open_tokenizer(args).vocab_size
    return f"{args.tokenizer_type}, {tokens} tokens, padded {args.padded_vocab_size}"


def _checkpoint(run: Any) -> str:
    from ultramem_megatron.megatron.checkpoint.design import check_design
    from ultramem_megatron.megatron.checkpoint.optimizer_layout import check_optimizer_layout
    from ultramem_megatron.megatron.checkpoint.source import (
        check_sums,
        settle_sums,
        source_of_weights,
    )
    from ultramem_megatron.megatron.upcycle import dense_checkpoint

    args = run.args
    settle_sums(args, run.ultramem is not None)
    source = source_of_weights(args)
    if source is not None:
        check_sums(source, args)
        check_design(source, args, run.ultramem)
        if run.ultramem is not None:
            check_optimizer_layout(source, args, run.ultramem, run.tables)
    dense = dense_checkpoint(args) if run.ultramem else None
    if dense:
        return f"starts from the dense model in {dense}"
    if source is None and args.load:
        return f"--load {args.load} holds none: starts from random weights"
    if source is None:
        return "none asked for: starts from random weights"
    return f"goes on from {source.iteration().name} of {source}, {_sums(source.iteration(), args)}"


def _sums(folder: Path, args: Any) -> str:
    from ultramem_megatron.faults.integrity import has_sums

    if not args.verify_integrity:
        return "sums not checked (--verify-integrity)"
    return "sums checked" if has_sums(folder) else "which has no sums"


def _save(run: Any) -> str:
    if not run.args.save:
        return "nothing: no --save"
    folder = Path(run.args.save).absolute()
    above = next(path for path in (folder, *folder.parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UltraMemError(f"--save {run.args.save}: {above} is no folder that can be written to.")
    free = shutil.disk_usage(above).free / 1e9
    return f"every {run.args.save_interval} steps to {run.args.save}, {free:.0f} GB free"


_CHECKS: dict[str, Callable[[Any], str]] = {
    "training": _training,
    "spans": _spans,
    "tokenizer": _tokenizer,  # which gives the size of the vocabulary to the next ones
    "data": _data,
    "memory": _memory,
    "checkpoint": _checkpoint,
    "save": _save,
}
"""By the name that their line begins with; each returns what it found, or raises UltraMemError."""


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
