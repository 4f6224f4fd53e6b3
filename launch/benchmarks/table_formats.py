"""Speed of an exported folder with its value tables in float32, bfloat16, int8 and fp8, on a CPU.

    ultramem bench table_formats --out DIR [--folder FOLDER] [--vllm PYTHON] [--rounds 5]

Without a folder, that of a model with two tables of 65,536 values of 128 and initial weights. In
bfloat16 all of the model is; int8 and fp8 are `ultramem quantize`'s, the rest in float32.
transformers reads prompts of random ids and goes on greedily, in turns of the formats, on one
thread, timed by what the process computes, so that other programs count little. With --vllm its
engine does the same, timed by the clock, on the cores that it takes. Writes DIR/table_formats.csv,
medians of rounds.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launch.benchmarks.environment import environment_columns
from launch.benchmarks.serving import Row, export, served
from launch.benchmarks.training_models import SCALES
from ultramem_megatron.errors import CommandParser, UltraMemError, exit_on_user_error
from ultramem_megatron.faults.results_folder import results_folder
from ultramem_megatron.tools import rows

FORMATS = ("float32", "bfloat16", "int8", "fp8")
_INITIAL = "initial weights"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write. Raises UltraMemError."""
    options = _parse(argv)
    results_folder(options.out)
    measured = measure(options)
    file = options.out / "table_formats.csv"
    rows.write(file, measured)
    for row in measured:
        print(
            f"{row['engine']:<12} {row['tables']:<8} {row['batch']:3} at once: prompts "
            f"{row['prompt_tokens_per_second']:9,.1f} tokens/s, a step {row['step_ms']:8.2f} ms"
        )
    print(file)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="ultramem bench table_formats",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the CSV")
    add("--folder", type=Path, help="of ultramem export --to hf, tables in float32")
    add("--vllm", type=Path, help="Python that has vLLM; without it transformers alone")
    add("--scale", choices=[*SCALES], default="small", help="without a folder (%(default)s)")
    add("--batches", type=int, nargs="+", default=[1, 16], help="texts at once (default 1 16)")
    add("--prompt", type=int, default=64, help="tokens of each prompt (default %(default)s)")
    add("--tokens", type=int, default=32, help="of each answer (default %(default)s)")
    add("--rounds", type=int, default=5, help="of every format (default %(default)s)")
    options = parser.parse_args(argv)
    least = {"prompt": 1, "tokens": 2, "rounds": 1, "batches": 1}
    for name, needed in least.items():
        value = min(options.batches) if name == "batches" else getattr(options, name)
        if value < needed:
            raise UltraMemError(f"--{name} is {value}; it must be at least {needed}.")
    if options.vllm is not None and not options.vllm.exists():
        raise UltraMemError(
            f"{options.vllm} is not there. Run bash launch/serving/setup.sh, or leave --vllm out."
        )
    return options


def measure(options: argparse.Namespace) -> list[Row]:
    """One row per engine, format and batch."""
    with tempfile.TemporaryDirectory() as made:
        folders = _folders(options, Path(made))
        found = _transformers(folders, options)
        own = {"transformers": {"transformers": version("transformers"), "vllm": ""}}
        if options.vllm is not None:
            served_pairs, own["vllm"] = _vllm(folders, options)
            found |= served_pairs
        sizes = {kind: _table_bytes(folder) for kind, folder in folders.items()}
    columns = environment_columns()
    return [
        {
            "model": _INITIAL if options.folder is None else options.folder.name,
            "engine": engine,
            "tables": kind,
            "table_mb": round(sizes[kind] / 1e6 / (2 if kind == "bfloat16" else 1), 2),
            "batch": batch,
            "prompt": options.prompt,
            "tokens": options.tokens,
            **_medians(pairs, batch, options),
            "rounds": options.rounds,
            **columns,
            **own[engine],
        }
        for (engine, kind, batch), pairs in found.items()
    ]


def _medians(pairs: Sequence[tuple[float, float]], batch: int, options: Any) -> Row:
    """pairs: of each round the seconds to the first token of all and to the last."""
    first = statistics.median(start for start, _ in pairs)
    steps = sorted((end - start) / (options.tokens - 1) for start, end in pairs)
    return {
        "prompt_tokens_per_second": round(batch * options.prompt / first, 1),
        "step_ms": round(1e3 * statistics.median(steps), 3),
        "step_ms_least": round(1e3 * steps[0], 3),
        "step_ms_most": round(1e3 * steps[-1], 3),
    }


def _folders(options: argparse.Namespace, made: Path) -> dict[str, Path]:
    """By format; that of bfloat16 is read in it."""
    from ultramem_megatron.tools.quantize import quantize

    folder = options.folder
    if folder is None:
        folder = made / "float32"
        scale = SCALES[options.scale]
        export([*scale.common, *scale.models["ultramem"]], folder)
    for kind in ("int8", "fp8"):
        quantize(folder, made / kind, kind, None)
    return {"float32": folder, "bfloat16": folder, "int8": made / "int8", "fp8": made / "fp8"}


def _table_bytes(folder: Path) -> int:
    """Of value tables, in the folder's files."""
    from safetensors import safe_open

    from ultramem_megatron.memory.tables.value_table import names_a_table

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # it is no mapping
                if names_a_table(name) or name.endswith((".codes", ".scales")):
                    total += opened.get_tensor(name).nbytes
    return total


def _transformers(
    folders: dict[str, Path], options: argparse.Namespace
) -> dict[tuple[str, str, int], list[tuple[float, float]]]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    models = {
        kind: AutoModelForCausalLM.from_pretrained(
            folder,
            trust_remote_code=True,
            dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32,
        ).eval()
        for kind, folder in folders.items()
    }
    generator = torch.Generator().manual_seed(1)
    vocabulary = next(iter(models.values())).config.vocab_size
    found: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    for number in range(options.rounds + 1):  # the first one is not counted
        for batch in options.batches:
            ids = torch.randint(vocabulary, (batch, options.prompt), generator=generator)
            for kind, model in models.items():
                seconds = (_seconds(model, ids, 1), _seconds(model, ids, options.tokens))
                if number:
                    found.setdefault(("transformers", kind, batch), []).append(seconds)
    return found


def _seconds(model: Any, ids: Any, tokens: int) -> float:
    """Of this process, for `tokens` more of each text (batch, prompt)."""
    start = time.process_time()
    model.generate(
        ids,
        attention_mask=ids.new_ones(ids.shape),
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=0,
    )
    return time.process_time() - start


def _vllm(
    folders: dict[str, Path], options: argparse.Namespace
) -> tuple[dict[tuple[str, str, int], list[tuple[float, float]]], Row]:
    """Also the columns that its environment changes."""
    asked = {name: getattr(options, name) for name in ("batches", "prompt", "tokens")}
    found: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    for kind, folder in folders.items():
        dtype = "bfloat16" if kind == "bfloat16" else "float32"
        given = {**asked, "repeats": options.rounds, "dtype": dtype}
        answer = served(folder, options.vllm, given)
        seconds = answer["seconds"]
        found |= {("vllm", kind, batch): seconds[str(batch)] for batch in options.batches}
    versions = {"torch": answer["torch"], "transformers": "", "vllm": answer["vllm"]}
    return found, {"threads": "", **versions}


if __name__ == "__main__":
    with exit_on_user_error():
        main()
