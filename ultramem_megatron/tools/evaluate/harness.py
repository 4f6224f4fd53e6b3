"""Our models as models of lm-evaluation-harness (package `lm_eval`), which is not ours to install.

Needs `pip install ".[eval]"` in the checkout. Import this module only where it is there.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from lm_eval.api.model import TemplateLM

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.inference.loading import LoadedModel
from ultramem_megatron.inference.sampling import continue_tokens
from ultramem_megatron.tools.evaluate.generation import Generation, generation_from
from ultramem_megatron.tools.evaluate.scoring import continuation_scores
from ultramem_megatron.tools.evaluate.windows import rolling_windows

_SEED = 1234


class HarnessModel(TemplateLM):
    """A model on one tensor-parallel group; every rank runs the harness with the same requests."""

    def __init__(self, loaded: LoadedModel, batch: int) -> None:
        """batch: sequences in one forward pass."""
        super().__init__()
        self.loaded = loaded
        self.batch = batch
        self.max_length = int(loaded.args.max_position_embeddings)

    @property
    def eot_token_id(self) -> int:
        """The end-of-document token; also what an empty context is replaced by."""
        return int(self.loaded.tokenizer.eod)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; nothing is added to them."""
        tokens: list[int] = self.loaded.tokenizer.tokenize(string)
        return tokens

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Of contexts that are too long the beginning is left out; a continuation is scored whole.

        Raises UltraMemError for one that has more tokens than the model has positions.
        """
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise UltraMemError(
                f"A continuation of the task has {longest} tokens, the model {self.max_length} "
                f"positions. Choose another task, or a model of more positions."
            )
        pairs = [(context, continuation) for _, context, continuation in requests]
        return [
            (score.log_probability, score.greedy)
            for score in continuation_scores(self.loaded.model, pairs, self.max_length, self.batch)
        ]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts, every token once, in windows as the harness cuts them."""
        texts = [
            list(rolling_windows(self.tok_encode(text), self.eot_token_id, self.max_length))
            for (text,) in (request.args for request in requests)
        ]
        pairs = [window for windows in texts for window in windows]
        scores = iter(continuation_scores(self.loaded.model, pairs, self.max_length, self.batch))
        return [sum(next(scores).log_probability for _ in windows) for windows in texts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations (or sampled, if asked for), cut before the first stop string.

        Raises UltraMemError, before any is made, for options we lack and prompts without room.
        """
        prompts = [self.tok_encode(request.args[0]) or [self.eot_token_id] for request in requests]
        wanted = [generation_from(request.args[1]) for request in requests]
        lengths = [
            generation.length_after(len(prompt), self.max_length)
            for prompt, generation in zip(prompts, wanted, strict=True)
        ]
        self._tell_shortened(prompts, wanted, lengths)
        texts = [""] * len(requests)
        for chosen in self._batches(prompts, wanted, lengths):
            options = self._engine_options(wanted[chosen[0]], lengths[chosen[0]], chosen[0])
            found = continue_tokens(self.loaded, [prompts[i] for i in chosen], options)
            for i, tokens in zip(chosen, found, strict=True):
                texts[i] = wanted[i].cut(self._decoded(tokens))
        return texts

    def _batches(
        self, prompts: list[list[int]], wanted: list[Generation], lengths: list[int]
    ) -> Iterator[list[int]]:
        """Numbers of requests that can be decoded together; long ones first."""
        alike = defaultdict(list)
        for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
            alike[wanted[i], lengths[i]].append(i)
        for numbers in alike.values():
            for first in range(0, len(numbers), self.batch):
                yield numbers[first : first + self.batch]

    def _tell_shortened(
        self, prompts: list[list[int]], wanted: list[Generation], lengths: list[int]
    ) -> None:
        asked = [one.new_tokens if one.total is None else 0 for one in wanted]
        short = [i for i, length in enumerate(lengths) if length < asked[i]]
        if short and dist.get_rank() == 0:
            least = min(short, key=lengths.__getitem__)
            print(
                f"{len(short)} of {len(lengths)} continuations get less room than the task asks "
                f"for: down to {lengths[least]} of {asked[least]} tokens, after a prompt of "
                f"{len(prompts[least])} in {self.max_length} positions.",
                flush=True,
            )

    def _engine_options(
        self, generation: Generation, tokens: int, number: int
    ) -> argparse.Namespace:
        """number: of the first request; repetitions of one must not all sample the same."""
        restricts = generation.top_k < self.loaded.args.padded_vocab_size
        return argparse.Namespace(
            tokens=tokens,
            temperature=generation.temperature,
            top_k=generation.top_k if restricts else 0,
            top_p=generation.top_p,
            seed=_SEED + number,
        )

    def _decoded(self, tokens: list[int]) -> str:
        from megatron.core.inference.text_generation_controllers.text_generation_controller import (
            TextGenerationController,
        )

        return str(TextGenerationController.detokenize(self.loaded.tokenizer, tokens))


def run_tasks(
    loaded: LoadedModel, tasks: Sequence[str], folder: str | None, batch: int, limit: int | None
) -> dict[str, Any]:
    """Results by task on rank 0, as the harness reports them; other ranks get nothing.

    folder: of tasks of your own (YAML), or None. limit: examples of each task, None for all.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        model=HarnessModel(loaded, batch),
        tasks=list(tasks),
        task_manager=TaskManager(include_path=folder),
        limit=limit,
        bootstrap_iters=0,
    )
    return dict(results["results"]) if results else {}
