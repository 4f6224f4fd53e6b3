"""Our models as models of lm-evaluation-harness (package `lm_eval`), which is not ours to install.

Needs `pip install "ultramem-megatron[eval]"`. Import this module only where it is there.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM

from ultramem_megatron.inference.loading import LoadedModel
from ultramem_megatron.inference.sampling import generate
from ultramem_megatron.tools.evaluate.scoring import continuation_scores
from ultramem_megatron.tools.evaluate.windows import batches

_DEFAULT_NEW_TOKENS = 256


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
        pairs = [(context, continuation) for _, context, continuation in requests]
        return [
            (score.log_probability, score.greedy)
            for score in continuation_scores(self.loaded.model, pairs, self.max_length, self.batch)
        ]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts, in windows that do not overlap, every token once."""
        return [self._rolling(request.args[0]) for request in requests]

    def _rolling(self, text: str) -> float:
        stream = np.array([self.eot_token_id, *self.tok_encode(text)])
        pairs = []
        for window in batches(stream, self.max_length, 1):
            tokens, targets = window.tokens[0].tolist(), window.targets[0].tolist()
            pairs.append((tokens[:1], targets))
        scores = continuation_scores(self.loaded.model, pairs, self.max_length, self.batch)
        return sum(score.log_probability for score in scores)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations (or sampled, if asked for), cut before the first stop string."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        wanted = int(options.get("max_gen_toks", _DEFAULT_NEW_TOKENS))
        tokens = min(wanted, self.max_length - 1)
        kept = self.tok_encode(context)[-(self.max_length - tokens) :]
        sampled = options.get("do_sample", False)
        settings = argparse.Namespace(
            tokens=tokens,
            temperature=options.get("temperature", 1.0) if sampled else 0.0,
            top_k=options.get("top_k", 0),
            top_p=options.get("top_p", 1.0),
            seed=1234,
            batching="static",
        )
        prompt = self.loaded.tokenizer.detokenize(kept or [self.eot_token_id])
        text = generate(self.loaded, [prompt], settings)[0]
        until = options.get("until", [])
        for stop in [until] if isinstance(until, str) else until:
            text = text.split(stop)[0] if stop else text
        return text


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
