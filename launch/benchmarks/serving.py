"""Latency and throughput of vLLM with an UltraMem model and with a dense one of equal FLOPs.

    ultramem bench serving --out DIR [--scale small|151m] [--batches 1 4 16 64] [--rounds 3]

Exports both with initial weights, in float32 (151m: bf16), and lets vLLM serve one after the other,
each once in every round, in its own environment (launch/serving/setup.sh; --vllm PYTHON where it is
elsewhere). So many requests at once, each with a prompt of random ids, are all answered with
`--tokens` tokens. Writes DIR/serving.csv, one row per model and batch, with medians of all rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from launch.benchmarks.environment import environment_columns
from launch.benchmarks.training import check_equal
from launch.benchmarks.training_models import SCALES
from ultramem_megatron.errors import CommandParser, UltraMemError, exit_on_user_error
from ultramem_megatron.faults.results_folder import results_folder
from ultramem_megatron.tools import rows

Row = dict[str, Any]
MODELS = ("dense", "ultramem")
_ROOT = Path(__file__).parents[2]
_DTYPES = {"small": "float32", "151m": "bfloat16"}
_OWN = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def export(flags: Sequence[str], folder: Path) -> None:
    """Write the model of these flags with initial weights and no tokenizer."""
    from megatron.core.utils import get_model_config

    from ultramem_megatron.inference.untrained import untrained_model
    from ultramem_megatron.megatron.flags.arguments import config_from_args
    from ultramem_megatron.tools.export.hf_folder import save_hf
    from ultramem_megatron.tools.export.hf_tokenizer import HFTokenizer
    from ultramem_megatron.tools.export.megatron import plain_config, plain_model

    model, args = untrained_model(flags, local_layers=True)
    config = plain_config(args, get_model_config(model), config_from_args(args))
    save_hf(plain_model(model, config), folder, HFTokenizer(), "Initial weights.")


def table(found: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> list[Row]:
    """Rows of what each round found for each model. Times are medians of rounds and repeats."""
    made = []
    for model, batch in product(MODELS, options.batches):
        pairs = [pair for round in found[model] for pair in round["seconds"][str(batch)]]
        first, last = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
        steps = sorted((end - start) / (options.tokens - 1) for start, end in pairs)
        made.append(
            {
                "scale": options.scale,
                "model": model,
                "batch": batch,
                "prompt": options.prompt,
                "tokens": options.tokens,
                "first_token_ms": round(1e3 * first, 1),
                "step_ms": round(1e3 * statistics.median(steps), 2),
                "step_ms_least": round(1e3 * steps[0], 2),
                "step_ms_most": round(1e3 * steps[-1], 2),
                "tokens_per_second": round(batch * options.tokens / last, 1),
                "runs": len(pairs),
            }
        )
    return made


def measure(options: argparse.Namespace) -> list[Row]:
    """One row per model and batch."""
    scale = SCALES[options.scale]
    sizes = check_equal(scale)
    found: dict[str, list[dict[str, Any]]] = {model: [] for model in MODELS}
    with tempfile.TemporaryDirectory() as made:
        for model in MODELS:
            export([*scale.common, *scale.models[model]], Path(made) / model)
        for number, model in product(range(options.rounds), MODELS):
            print(f"round {number + 1}: {model}", file=sys.stderr)
            found[model].append(served(Path(made) / model, options.vllm, _asked(options)))
    last = found[MODELS[0]][-1]
    columns = {**environment_columns(), "torch": last["torch"], "vllm": last["vllm"]}
    del columns["threads"]  # this process', not vLLM's
    return [
        {**row, **_size(sizes[row["model"]]), "rounds": options.rounds, **columns}
        for row in table(found, options)
    ]


def _size(sizes: Any) -> Row:
    return {"parameters": sizes.total, "flops_per_token": sizes.flops_per_token}


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    asked = {name: getattr(options, name) for name in ("batches", "prompt", "tokens", "repeats")}
    return {**asked, "dtype": _DTYPES[options.scale]}


def served(folder: Path, vllm: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """What launch/serving/measure.py finds when `asked`, in a process of vLLM's own.

    Raises UltraMemError where vLLM fails.
    """
    script = str(_ROOT / "launch" / "serving" / "measure.py")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as made:
        file = Path(made) / "seconds.json"
        done = subprocess.run(
            [str(vllm.absolute()), script, str(folder.resolve()), str(file), json.dumps(asked)],
            env={**env, **_OWN, "HF_MODULES_CACHE": made},
            cwd=made,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise UltraMemError(f"{vllm} ended with status {done.returncode}:\n{last}")
        found: dict[str, Any] = json.loads(file.read_text())
    return found


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="ultramem bench serving", description=__doc__.split("\n")[0])
    add = parser.add_argument
    default = Path(os.environ.get("VLLM_ENV", _ROOT / ".venv-vllm")) / "bin" / "python"
    add("--out", type=Path, required=True, help="folder for the CSV")
    add("--vllm", type=Path, default=default, help="Python that has vLLM (default %(default)s)")
    add("--scale", choices=_DTYPES, default="small", help="sizes (default %(default)s)")
    add("--batches", type=int, nargs="+", default=[1, 4, 16, 64], help="requests at once")
    add("--prompt", type=int, default=64, help="tokens of each prompt (default 64)")
    add("--tokens", type=int, default=32, help="tokens of each answer (default 32)")
    add("--repeats", type=int, default=3, help="of each batch in a round (default 3)")
    add("--rounds", type=int, default=3, help="starts of vLLM with each model (default 3)")
    options = parser.parse_args(argv)
    least = {"prompt": 1, "tokens": 2, "repeats": 1, "rounds": 1}
    given = {name: getattr(options, name) for name in least} | {"batches": min(options.batches)}
    for name, value in given.items():
        if value < least.get(name, 1):
            raise UltraMemError(f"--{name} is {value}; it must be at least {least.get(name, 1)}.")
    if not options.vllm.exists():
        raise UltraMemError(
            f"{options.vllm} is not there. Run bash launch/serving/setup.sh, or give --vllm PYTHON."
        )
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Measure. Raises UltraMemError for wrong flags, and where vLLM fails."""
    options = _parse(argv)
    results_folder(options.out)
    measured = measure(options)
    file = options.out / "serving.csv"
    rows.write(file, measured)
    for row in measured:
        print(
            f"{row['model']:<9} {row['batch']:4} at once: {row['first_token_ms']:8.1f} ms to the "
            f"first token, {row['step_ms']:7.2f} ms a step, "
            f"{row['tokens_per_second']:,.0f} tokens/s"
        )
    print(file)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
