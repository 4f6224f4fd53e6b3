"""Perplexity on indexed data, or tasks of lm-evaluation-harness.

    ultramem evaluate --load DIR --data PREFIX [PREFIX ...]
    ultramem evaluate --load DIR --tasks lambada_openai my_task [--task-folder F]

Prints one line of JSON for each data set or task. Under torchrun the ranks share the model.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ultramem_megatron.errors import CommandParser, UltraMemError, exit_on_user_error, how_to_get
from ultramem_megatron.inference.layout_flags import add_layout_arguments, layout_from


def main(argv: Sequence[str] | None = None) -> None:
    """Load, evaluate, print."""
    options = _parse(argv)
    measured = _tasks(options) if options.tasks else _perplexities(options)
    with contextlib.redirect_stdout(sys.stderr):
        results = list(measured)
    if os.environ["RANK"] == "0":
        for result in results:
            print(json.dumps(result, default=float))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="ultramem evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--load", required=True, help="Checkpoint folder (training's --save).")
    add("--ckpt-step", type=int, help="Iteration to load; default: the latest.")
    add("--data", nargs="+", metavar="PREFIX", help="Indexed data sets, without their ending.")
    add("--window", type=int, help="Tokens of a window; default: the trained sequence length.")
    add("--batch-size", type=int, default=8, help="Windows or texts at a time. Default 8.")
    add("--tasks", nargs="+", metavar="TASK", help="Tasks of lm-evaluation-harness.")
    add("--task-folder", help="Folder with tasks of your own.")
    add("--limit", type=int, help="Examples of each task; default: all.")
    add("--tokenizer-model", help="Where the tokenizer is, if it has moved.")
    add_layout_arguments(parser)
    options = parser.parse_args(argv)
    if bool(options.data) == bool(options.tasks):
        raise UltraMemError("Give --data PREFIX for perplexity, or --tasks TASK, one of the two.")
    for name in ("batch_size", "window", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            flag = "--" + name.replace("_", "-")
            raise UltraMemError(f"{flag} is {value}; it must be a whole number >= 1.")
    return options


def _perplexities(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from ultramem_megatron.inference.loading import load_model
    from ultramem_megatron.inference.table_memory import describe_cache
    from ultramem_megatron.tools.evaluate.perplexity import perplexity, read_stream

    layout = layout_from(options)
    model, args = load_model(options.load, ckpt_step=options.ckpt_step, layout=layout)
    window = options.window or args.seq_length
    if window > args.max_position_embeddings:
        raise UltraMemError(
            f"--window {window} exceeds the model's {args.max_position_embeddings} positions."
        )
    streams = {prefix: read_stream(prefix, args.padded_vocab_size) for prefix in options.data}
    for prefix, stream in streams.items():
        found = perplexity(model, stream, window, options.batch_size)
        yield {
            "data": prefix,
            "window": window,
            "tokens": found.tokens,
            "loss": round(found.loss, 6),
            "perplexity": round(found.perplexity, 4),
        }
    if layout.table_cache_rows:
        print(describe_cache(model))


def _tasks(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if importlib.util.find_spec("lm_eval") is None:
        raise UltraMemError(
            f"--tasks needs lm-evaluation-harness, which is not installed. {how_to_get('lm_eval')}"
        )
    from ultramem_megatron.inference.loading import load_for_inference
    from ultramem_megatron.inference.table_memory import describe_cache
    from ultramem_megatron.tools.evaluate.harness import run_tasks

    layout = layout_from(options)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if layout.tensor_parallel not in (None, ranks):
        raise UltraMemError(
            f"--tensor-model-parallel-size {layout.tensor_parallel} with --tasks must be all "
            f"{ranks} ranks: the harness asks one model."
        )
    loaded = load_for_inference(
        options.load,
        ckpt_step=options.ckpt_step,
        tokenizer_model=options.tokenizer_model,
        layout=layout,
    )
    results = run_tasks(
        loaded, options.tasks, options.task_folder, options.batch_size, options.limit
    )
    for task, result in results.items():
        yield {"task": task, **result}
    if layout.table_cache_rows:
        print(describe_cache(loaded.model))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
