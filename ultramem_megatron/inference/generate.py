"""Sample text from a trained checkpoint, with a KV cache.

    ultramem generate --load DIR --prompt "def main():" --tokens 100

Prints prompt and continuation to standard output; everything else goes to standard error. Under
torchrun the ranks share the model (--tensor-model-parallel-size), and each tensor-parallel group
takes its share of the prompts.
"""

import argparse
import contextlib
import os
import sys
import time
import warnings
from collections.abc import Sequence

from ultramem_megatron.errors import CommandParser, exit_on_user_error
from ultramem_megatron.inference.layout_flags import add_layout_arguments, layout_from


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see --help."""
    parser = CommandParser(
        prog="ultramem generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--load", required=True, help="Checkpoint folder (training's --save).")
    parser.add_argument("--ckpt-step", type=int, help="Iteration to load; default: the latest.")
    parser.add_argument(
        "--prompt", action="append", help="Text to continue; repeat for a batch. Default: stdin."
    )
    parser.add_argument("--tokens", type=int, default=100, help="Tokens to add (default 100).")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy. Default 0.8.")
    parser.add_argument("--top-k", type=int, default=0, help="Sample from the k likeliest; 0: all.")
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="Sample from the likeliest with this total."
    )
    parser.add_argument("--seed", type=int, default=1234, help="Of the sampling. Default 1234.")
    parser.add_argument(
        "--batching",
        choices=("static", "dynamic"),
        default="static",
        help="Megatron's engine: all prompts in step (default), or each on its own, from a cache "
        "in blocks.",
    )
    parser.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="Capture decoding steps as CUDA graphs (GPU and --batching dynamic only).",
    )
    parser.add_argument(
        "--premultiply-values",
        action="store_true",
        help="Multiply value tables by their projections first: no projection in a step, for E*h*D/"
        "Dv times the tables' memory. Tables must be whole on each rank.",
    )
    parser.add_argument("--tokenizer-model", help="Where the tokenizer is, if it has moved.")
    add_layout_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Load, sample, print."""
    options = parse(argv)
    # Imported here: --help and a wrong flag need no torch.
    from ultramem_megatron.inference.loading import load_for_inference
    from ultramem_megatron.inference.sampling import check, generate
    from ultramem_megatron.inference.table_memory import describe_cache

    check(options)
    layout = layout_from(options)
    prompts = options.prompt or [sys.stdin.read()]
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation of the static engine, missing fusions
        loaded = load_for_inference(
            options.load,
            ckpt_step=options.ckpt_step,
            tokenizer_model=options.tokenizer_model,
            layout=layout,
            cuda_graphs=options.cuda_graphs,
            premultiply_values=options.premultiply_values,
        )
        start = time.perf_counter()
        texts = generate(loaded, prompts, options)
        seconds = time.perf_counter() - start
    if os.environ["RANK"] != "0":
        return
    print(f"{len(texts)} x up to {options.tokens} tokens in {seconds:.1f} s", file=sys.stderr)
    if layout.table_cache_rows:
        print(describe_cache(loaded.model), file=sys.stderr)
    for prompt, text in zip(prompts, texts, strict=True):
        print(prompt + text)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
