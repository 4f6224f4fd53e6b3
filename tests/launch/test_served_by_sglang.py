"""SGLang's engine with exported folders, by its Transformers fallback: transformers' tokens.

SGLANG_ENV names an environment with SGLang (launch/serving/README.md). On a CPU it imports kernels
that are in no wheel; a stand-in gives their names, and fails where one is called.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.launch.served import TOLERANCE, ULTRAMEM, export, greedy, own_modules, prompts
from tests.ranks import run_on_ranks
from ultramem_megatron.tools.quantize import quantize

_PYTHON = Path(os.environ.get("SGLANG_ENV", "nowhere")).absolute() / "bin/python"
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not _PYTHON.exists(), reason="SGLANG_ENV names no environment with SGLang"),
]
_CASES = ("float32", "int8")
_KERNELS = """
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_, **__):
        raise RuntimeError(f"sgl_kernel.{name} was called, which is not there")

    return missing
"""
_ENGINE = """
import json, sys
import sglang

def main(model, file):
    engine = sglang.Engine(
        model_path=model, trust_remote_code=True, model_impl="transformers", device="cpu",
        attention_backend="torch_native", sampling_backend="pytorch", grammar_backend="none",
        dtype="float32", skip_tokenizer_init=True, disable_overlap_schedule=True,
        disable_cuda_graph=True, mem_fraction_static=0.1, max_total_tokens=2048,
        max_running_requests=8,
    )
    with open(file) as opened:
        prompts = json.load(opened)
    sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    found = []
    for _ in range(2):  # the second time from the cache of prefixes
        answers = engine.generate(
            input_ids=prompts, sampling_params=sampling, return_logprob=True
        )
        found.append([
            (answer["output_ids"], [p[0] for p in answer["meta_info"]["output_token_logprobs"]])
            for answer in answers
        ])
    engine.shutdown()
    with open(file, "w") as opened:
        json.dump(found, opened)

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


def _generated(folder: Path, model: str) -> Any:
    """Twice all prompts at once: tokens and log-probabilities."""
    file, script = folder / "prompts.json", folder / "generate.py"
    file.write_text(json.dumps(prompts()))
    script.write_text(_ENGINE)
    (folder / "sgl_kernel.py").write_text(_KERNELS)
    env = {**os.environ, **own_modules(folder), "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [str(_PYTHON), str(script), str(folder / model), str(file)],
        env={**env, "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(file.read_text())


@pytest.mark.parametrize("case", _CASES)
def test_tokens_and_their_probabilities_are_those_of_transformers(
    case: str, tmp_path: Path
) -> None:
    run_on_ranks(1, export, tmp_path, ULTRAMEM)
    model = "hf"
    if case == "int8":
        model = case
        quantize(tmp_path / "hf", tmp_path / model, "int8", None)
    wanted = greedy(tmp_path, model)
    for found in _generated(tmp_path, model):
        for (ids, logs), (wanted_ids, wanted_logs) in zip(found, wanted, strict=True):
            assert ids == wanted_ids
            assert logs == pytest.approx(wanted_logs, abs=TOLERANCE)
