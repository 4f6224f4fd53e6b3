"""vLLM with the folders of every kind of values, and of tables in 8 bits: transformers' tokens."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.launch.served import (
    NEEDS_VLLM,
    TOLERANCE,
    ULTRAMEM,
    VLLM,
    export,
    greedy,
    own_modules,
    prompts,
)
from tests.ranks import run_on_ranks
from tests.tools.export.models import FAMILY
from ultramem_megatron.tools.quantize import quantize

pytestmark = NEEDS_VLLM
_KINDS: dict[str, dict[str, Any]] = {
    "ultramem": ULTRAMEM,
    "pkm": {**ULTRAMEM, "ultramem_retrieval": "pkm", "ultramem_softmax": True},
    "ultramemv2": FAMILY["ultramemv2"],
    "memory+": FAMILY["memory+"],
    "peer": {**FAMILY["peer"], "ultramem_value_dim": 128},
}
_CASES = [*_KINDS, "ultramem int8", "ultramemv2 fp8"]
_GENERATE = """
import json, sys
from vllm import LLM, SamplingParams

def main(model, file):
    llm = LLM(model=model, trust_remote_code=True, model_impl="transformers", dtype="float32",
              enforce_eager=True)
    with open(file) as opened:
        prompts = [{"prompt_token_ids": ids} for ids in json.load(opened)]
    sampling = SamplingParams(temperature=0, max_tokens=8, logprobs=1, ignore_eos=True)
    found = []
    for answer in llm.generate(prompts, sampling):
        ids = list(answer.outputs[0].token_ids)
        logs = [step[i].logprob for i, step in zip(ids, answer.outputs[0].logprobs)]
        found.append((ids, logs))
    with open(file, "w") as opened:
        json.dump(found, opened)

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


def _generated(folder: Path, model: str) -> list[tuple[list[int], list[float]]]:
    """vLLM's tokens and their log-probabilities, all prompts at once."""
    file, script = folder / "prompts.json", folder / "generate.py"
    file.write_text(json.dumps(prompts()))
    script.write_text(_GENERATE)  # a file: vLLM starts processes that import it
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(VLLM), str(script), str(folder / model), str(file)]
    done = subprocess.run(
        command,
        env=env | own | own_modules(folder),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1800,  # the first compiles the sampler
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found: list[tuple[list[int], list[float]]] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize("case", _CASES)
def test_tokens_and_their_probabilities_are_those_of_transformers(
    case: str, tmp_path: Path
) -> None:
    kind, _, bits = case.partition(" ")
    run_on_ranks(1, export, tmp_path, _KINDS[kind])
    model = "hf"
    if bits:
        model = bits
        quantize(tmp_path / "hf", tmp_path / bits, bits, None)
    wanted = greedy(tmp_path, model)
    for (ids, logs), (wanted_ids, wanted_logs) in zip(
        _generated(tmp_path, model), wanted, strict=True
    ):
        assert ids == wanted_ids
        assert logs == pytest.approx(wanted_logs, abs=TOLERANCE)
