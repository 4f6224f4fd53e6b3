"""Small exported folders for vLLM, and what transformers makes of their prompts.

vLLM is where launch/serving/setup.sh has made its environment: VLLM_ENV, else .venv-vllm.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ROOT
from tests.tools.export.models import shaken
from tests.training_runs import make_saving_fast, tiny_gpt

VLLM = Path(os.environ.get("VLLM_ENV", ROOT / ".venv-vllm")) / "bin/python"
NEEDS_VLLM = [
    pytest.mark.long,
    pytest.mark.skipif(
        not VLLM.exists(), reason=f"{VLLM} is not there: bash launch/serving/setup.sh"
    ),
]
PLAIN: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 128,  # heads of 32: vLLM's attention on CPUs knows no smaller ones
    "seq_length": 128,
    "max_position_embeddings": 128,
    "init_method_std": 0.2,
    "swiglu": True,
    "normalization": "RMSNorm",
    "disable_bias_linear": True,
    "group_query_attention": True,
    "num_query_groups": 2,
}
ULTRAMEM = {"ultramem_spans": "1:2/3:4", "ultramem_num_keys": 24, "ultramem_topk": 8}
TOLERANCE = 2e-4
"""Of log-probabilities in float32: other orders of sums, on values of some 10."""
_TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
prompts, found = torch.load(sys.argv[2]), []
for prompt in prompts:
    ids, logs = torch.tensor([prompt]), []
    for _ in range(8):
        with torch.no_grad():
            scores = model(ids).logits[0, -1].log_softmax(-1)
        ids = torch.cat([ids, scores.argmax().view(1, 1)], 1)
        logs.append(scores.max().item())
    found.append((ids[0, len(prompt):].tolist(), logs))
torch.save(found, sys.argv[2])
"""
_HELD = """
def held(model):
    found = model.state_dict()
    return sum(tensor.nbytes for name, tensor in found.items() if "values.table" in name)
"""  # a module, which vLLM's ranks import
_VLLM = """
import json, sys
from held import held
from vllm import LLM, SamplingParams

def main(model, file, ranks, overrides):
    llm = LLM(model=model, trust_remote_code=True, model_impl="transformers", dtype="float32",
              enforce_eager=True, tensor_parallel_size=int(ranks),
              hf_overrides=json.loads(overrides))
    with open(file) as opened:
        prompts = [{"prompt_token_ids": ids} for ids in json.load(opened)]
    sampling = SamplingParams(temperature=0, max_tokens=8, logprobs=1, ignore_eos=True)
    found = []
    for answer in llm.generate(prompts, sampling):
        ids = list(answer.outputs[0].token_ids)
        logs = [step[i].logprob for i, step in zip(ids, answer.outputs[0].logprobs)]
        found.append((ids, logs))
    with open(file, "w") as opened:
        json.dump([found, llm.apply_model(held)], opened)

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


def export(folder: Path, memories: Mapping[str, Any]) -> None:
    """Write an untrained model with such memories to folder/hf; runs on one rank."""
    from ultramem_megatron.data.tokenizer import save, train
    from ultramem_megatron.inference.untrained import untrained_model
    from ultramem_megatron.megatron.checkpoint.weights import save_weights
    from ultramem_megatron.tools.export.__main__ import main

    make_saving_fast()
    save(train([(ROOT / "README.md").read_text()], 400), folder / "tokenizer")
    model, args = untrained_model(tiny_gpt(**{**PLAIN, **memories}))
    shaken(model)
    args.tokenizer_type = "HuggingFaceTokenizer"
    args.tokenizer_model = str(folder / "tokenizer")
    save_weights(model, args, folder / "checkpoint")
    main(["--load", f"{folder}/checkpoint", "--to", "hf", f"{folder}/hf"])


def prompts() -> list[list[int]]:
    """Ids of several lengths; two begin alike, for the prefix cache."""
    generator = torch.Generator().manual_seed(2)
    lengths = (3, 17, 64, 90)
    found = [torch.randint(2, 400, (n,), generator=generator).tolist() for n in lengths]
    return [*found, found[2] + found[0]]


def greedy(folder: Path, model: str = "hf") -> list[tuple[list[int], list[float]]]:
    """transformers' tokens and their log-probabilities, each prompt alone, without a cache."""
    file = folder / "prompts.pt"
    torch.save(prompts(), file)
    command = [sys.executable, "-c", _TRANSFORMERS, str(folder / model), str(file)]
    subprocess.run(command, check=True, env={**os.environ, **own_modules(folder)})
    found: list[tuple[list[int], list[float]]] = torch.load(file)
    return found


def generated(
    folder: Path, model: str = "hf", ranks: int = 1, **overrides: Any
) -> tuple[list[tuple[list[int], list[float]]], list[int]]:
    """vLLM's tokens and log-probabilities, all prompts at once; of each rank, bytes of tables.

    overrides: of the folder's config.json.
    """
    file, script = folder / "prompts.json", folder / "generate.py"
    file.write_text(json.dumps(prompts()))
    (folder / "held.py").write_text(_HELD)
    script.write_text(_VLLM)  # a file: vLLM starts processes that import it
    command = [str(VLLM), str(script), str(folder / model), str(file), str(ranks)]
    done = subprocess.run(
        [*command, json.dumps(overrides)],
        env=vllm_environment(folder, ranks),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1800,  # the first compiles the sampler
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found: tuple[list[tuple[list[int], list[float]]], list[int]] = json.loads(file.read_text())
    return found


def vllm_environment(folder: Path, ranks: int = 1) -> dict[str, str]:
    """What vLLM is started in."""
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    own["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions are sent to its ranks
    if ranks > 1:
        own["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(ranks)))  # a core for each
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return env | own | own_modules(folder)


def own_modules(folder: Path) -> dict[str, str]:
    """Where transformers copies a folder's code, so that none is mistaken for another's."""
    return {"HF_MODULES_CACHE": str(folder / "modules")}
