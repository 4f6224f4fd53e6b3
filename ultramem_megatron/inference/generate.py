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
from typing import TYPE_CHECKING, Any

from ultramem_megatron.errors import UltraMemError, exit_on_user_error
from ultramem_megatron.memory.tables.settings import PARTITIONS

if TYPE_CHECKING:  # imported where it is used: --help and a wrong flag need no torch
    from ultramem_megatron.inference.loading import InferenceLayout, LoadedModel


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(
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
        "--batching", choices=("static", "dynamic"), default="static",
        help="Megatron's engine: all prompts in step (default), or each on its own, from a cache "
        "in blocks.",
    )  # fmt: skip
    parser.add_argument(
        "--cuda-graphs", action="store_true",
        help="Capture decoding steps as CUDA graphs (GPU and --batching dynamic only).",
    )  # fmt: skip
    parser.add_argument(
        "--premultiply-values", action="store_true",
        help="Multiply value tables by their projections first: no projection in a step, for E*h*D/"
        "Dv times the tables' memory. Tables must be whole on each rank.",
    )  # fmt: skip
    parser.add_argument("--tokenizer-model", help="Where the tokenizer is, if it has moved.")
    add_layout_arguments(parser)
    return parser.parse_args(argv)


def add_layout_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say how the ranks of a torchrun share the model."""
    parser.add_argument(
        "--tensor-model-parallel-size", "--tensor-parallel-size", type=int,
        dest="tensor_parallel_size", metavar="T",
        help="Ranks that share each weight. Default: all. (The short name goes with the next "
        "release.)",
    )  # fmt: skip
    parser.add_argument(
        "--ultramem-parallel-size", type=int, metavar="P",
        help="Ranks that share each value table. Default: all (with experts, those of one tensor-"
        "parallel group).",
    )  # fmt: skip
    parser.add_argument(
        "--ultramem-partition", choices=PARTITIONS, default="auto",
        help="How they share it, as in training. Default: auto, by bytes moved.",
    )  # fmt: skip


def layout_from(options: argparse.Namespace) -> "InferenceLayout":
    """The layout those flags ask for."""
    from ultramem_megatron.inference.loading import InferenceLayout

    return InferenceLayout(
        options.tensor_parallel_size, options.ultramem_parallel_size, options.ultramem_partition
    )


def check(options: argparse.Namespace) -> None:
    """Raise UltraMemError for values that make no sense, before anything is loaded."""
    rules = (
        ("--tokens", options.tokens, options.tokens >= 1, "a whole number >= 1"),
        ("--temperature", options.temperature, options.temperature >= 0, "a number >= 0"),
        ("--top-k", options.top_k, options.top_k >= 0, "a whole number >= 0"),
        ("--top-p", options.top_p, 0 < options.top_p <= 1, "a number > 0 and <= 1"),
    )
    for name, value, holds, allowed in rules:
        if not holds:
            raise UltraMemError(f"{name} is {value}; it must be {allowed}.")
    if options.cuda_graphs and options.batching != "dynamic":
        raise UltraMemError(
            "--cuda-graphs needs --batching dynamic: with static batching each step has its own "
            "length."
        )
    if options.top_k and options.top_p < 1:
        options.top_p = 1.0  # the engine takes one or the other; the explicit flag wins


def generate(
    loaded: "LoadedModel", prompts: Sequence[str], options: argparse.Namespace
) -> list[str]:
    """Continuations of `prompts`, without the prompts; all ranks give the same prompts.

    Raises UltraMemError if a prompt is empty or with its continuation exceeds the trained length.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state

    from ultramem_megatron.inference.loading import serve_until_all_finish

    length = _check_lengths(loaded, prompts, options.tokens)
    replicas = parallel_state.get_data_parallel_group()
    own = prompts[replicas.rank() :: replicas.size()]
    texts = _decode(loaded, own, length, options) if own else []
    serve_until_all_finish(loaded.model)
    everyone: list[list[str]] = [[] for _ in range(replicas.size())]
    dist.all_gather_object(everyone, texts, group=replicas)
    return [everyone[i % replicas.size()][i // replicas.size()] for i in range(len(prompts))]


def _decode(
    loaded: "LoadedModel", prompts: Sequence[str], length: int, options: argparse.Namespace
) -> list[str]:
    """Continuations from Megatron's static engine, all in one batch, or from its dynamic one."""
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
        GPTInferenceWrapper,
    )
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController,
    )

    from ultramem_megatron.inference.loading import dynamic_context

    def controller(context: Any) -> Any:
        wrapper = GPTInferenceWrapper(loaded.model, context)
        return TextGenerationController(wrapper, loaded.tokenizer)

    if options.batching == "dynamic":
        from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine

        dynamic = dynamic_context(loaded.model, len(prompts), length)
        controls = controller(dynamic)
        controls.sampling_rng.manual_seed(options.seed)
        engine = DynamicInferenceEngine(controls, dynamic)
        records = engine.generate(list(prompts), _sampling(options))
        return [str(record.merge().generated_text) for record in records]

    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines import StaticInferenceEngine

    engine = StaticInferenceEngine(
        controller(StaticInferenceContext(len(prompts), length)),
        max_batch_size=len(prompts), random_seed=options.seed, legacy=True,
    )  # fmt: skip
    results = engine.generate(prompts=list(prompts), sampling_params=_sampling(options))
    return [str(result.generated_text) for result in results]


def _sampling(options: argparse.Namespace) -> Any:
    from megatron.core.inference.sampling_params import SamplingParams

    if options.temperature == 0:
        return SamplingParams(top_k=1, num_tokens_to_generate=options.tokens)
    return SamplingParams(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=0.0 if options.top_p == 1 or options.top_k else options.top_p,
        num_tokens_to_generate=options.tokens,
    )


def _check_lengths(loaded: "LoadedModel", prompts: Sequence[str], tokens: int) -> int:
    """Longest prompt plus continuation, in tokens."""
    lengths = [len(loaded.tokenizer.tokenize(prompt)) if prompt else 0 for prompt in prompts]
    limit = loaded.args.max_position_embeddings
    for prompt, length in zip(prompts, lengths, strict=True):
        if length == 0:
            raise UltraMemError(f"--prompt {prompt!r} has no tokens. Give at least one character.")
        if length + tokens > limit:
            raise UltraMemError(
                f"--prompt of {length} tokens plus --tokens {tokens} exceeds the model's "
                f"{limit} positions. Use at most --tokens {max(limit - length, 0)}, or a shorter "
                f"prompt."
            )
    return max(lengths) + tokens


def main(argv: Sequence[str] | None = None) -> None:
    """Load, sample, print."""
    options = parse(argv)
    check(options)
    prompts = options.prompt or [sys.stdin.read()]
    from ultramem_megatron.inference.loading import load_for_inference

    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation of the static engine, missing fusions
        loaded = load_for_inference(
            options.load,
            ckpt_step=options.ckpt_step,
            tokenizer_model=options.tokenizer_model,
            layout=layout_from(options),
            cuda_graphs=options.cuda_graphs,
            premultiply_values=options.premultiply_values,
        )
        start = time.perf_counter()
        texts = generate(loaded, prompts, options)
        seconds = time.perf_counter() - start
    if os.environ["RANK"] != "0":
        return
    print(f"{len(texts)} x up to {options.tokens} tokens in {seconds:.1f} s", file=sys.stderr)
    for prompt, text in zip(prompts, texts, strict=True):
        print(prompt + text)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
