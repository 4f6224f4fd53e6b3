"""Continuations of prompts, by Megatron's static or dynamic engine."""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.inference.dynamic_batching import dynamic_context
from ultramem_megatron.inference.loading import LoadedModel
from ultramem_megatron.inference.lockstep import serve_until_all_finish
from ultramem_megatron.inference.prompts import require_text, token_ids


def check(options: argparse.Namespace) -> None:
    """Raise UltraMemError for values that make no sense, before anything is loaded."""
    rules = (
        ("--tokens", options.tokens, options.tokens >= 1, "a whole number >= 1"),
        (
            "--temperature",
            options.temperature,
            0 <= options.temperature < math.inf,
            "a number >= 0",
        ),
        ("--top-k", options.top_k, options.top_k >= 0, "a whole number >= 0"),
        ("--top-p", options.top_p, 0 < options.top_p <= 1, "a number > 0 and <= 1"),
        ("--seed", options.seed, 0 <= options.seed < 2**63, "a whole number from 0 to 2^63 - 1"),
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


def generate(loaded: LoadedModel, prompts: Sequence[str], options: argparse.Namespace) -> list[str]:
    """Continuations of `prompts`, without the prompts; all ranks give the same prompts.

    Raises UltraMemError if a prompt is empty or with its continuation exceeds the trained length,
    more picks are asked for than there are ids, or the ids stand for no text.
    """
    _check_top_k(loaded, options.top_k)
    length = _check_lengths(loaded, prompts, options.tokens)
    require_text(loaded)
    return _on_replicas(loaded, prompts, lambda own: _decode(loaded, own, length, options))


def continue_tokens(
    loaded: LoadedModel, prompts: Sequence[list[int]], options: argparse.Namespace
) -> list[list[int]]:
    """Token ids that follow each of `prompts`, up to options.tokens or the end of the document.

    Neither the prompt nor the end-of-document token is in them. As `generate`, by the static
    engine; a prompt has one token at least, and fits into the model's positions with what follows.
    """
    length = max(map(len, prompts)) + options.tokens
    return _on_replicas(loaded, prompts, lambda own: _decode_tokens(loaded, own, length, options))


def _on_replicas[P, R](
    loaded: LoadedModel, prompts: Sequence[P], decode: Callable[[Sequence[P]], list[R]]
) -> list[R]:
    """Decode a share of the prompts on each replica of the model; every rank gets all results."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    replicas = parallel_state.get_data_parallel_group()
    own = prompts[replicas.rank() :: replicas.size()]
    found = decode(own) if own else []
    serve_until_all_finish(loaded.model)
    everyone: list[list[R]] = [[] for _ in range(replicas.size())]
    dist.all_gather_object(everyone, found, group=replicas)
    return [everyone[i % replicas.size()][i // replicas.size()] for i in range(len(prompts))]


def _decode(
    loaded: LoadedModel, prompts: Sequence[str], length: int, options: argparse.Namespace
) -> list[str]:
    """Continuations from Megatron's static engine, all in one batch, or from its dynamic one."""
    if options.batching == "dynamic":
        from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine

        dynamic = dynamic_context(loaded.model, len(prompts), length)
        engine = DynamicInferenceEngine(_controller(loaded, dynamic, options.seed), dynamic)
        records = engine.generate(list(prompts), _sampling(options))
        return [str(record.merge().generated_text) for record in records]

    engine = _static_engine(loaded, len(prompts), length, options.seed)
    results = engine.generate(prompts=list(prompts), sampling_params=_sampling(options))
    return [str(result.generated_text) for result in results]


def _decode_tokens(
    loaded: LoadedModel, prompts: Sequence[list[int]], length: int, options: argparse.Namespace
) -> list[list[int]]:
    engine = _static_engine(loaded, len(prompts), length, options.seed)
    requests = [
        engine.scheduler.add_request(
            prompt="", prompt_tokens=list(prompt), sampling_params=_sampling(options)
        )
        for prompt in prompts
    ]
    engine.run_engine()
    done = engine.scheduler.completed_request_pool
    return [done[request].generated_tokens.tolist() for request in requests]


def _static_engine(loaded: LoadedModel, batch: int, length: int, seed: int) -> Any:
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines import StaticInferenceEngine

    return StaticInferenceEngine(
        _controller(loaded, StaticInferenceContext(batch, length), seed),
        max_batch_size=batch,
        legacy=True,
    )


def _controller(loaded: LoadedModel, context: Any, seed: int) -> Any:
    """What samples for an engine; the static one's own seed is of another generator."""
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
        GPTInferenceWrapper,
    )
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController,
    )

    wrapper = GPTInferenceWrapper(loaded.model, context)
    controller = TextGenerationController(wrapper, loaded.tokenizer)
    controller.sampling_rng.manual_seed(seed)
    return controller


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


def _check_top_k(loaded: LoadedModel, top_k: int) -> None:
    ids = loaded.tokenizer.vocab_size
    if top_k > ids:
        raise UltraMemError(f"--top-k is {top_k}; the model's vocabulary has {ids} ids.")


def _check_lengths(loaded: LoadedModel, prompts: Sequence[str], tokens: int) -> int:
    """Longest prompt plus continuation, in tokens."""
    lengths = [len(token_ids(loaded, prompt, "--prompt")) if prompt else 0 for prompt in prompts]
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
