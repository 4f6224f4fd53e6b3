"""One training in a process of its own, forked from a server that has imported everything.

Megatron's global state cannot be reset, so a run never shares a process; its imports, which would
take longer than some of the runs, are shared.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from launch.ablations.models import Model
from launch.report import write_json
from launch.stage import LAST_LINES, StageError

EVAL_BATCHES = 12  # global batches of one evaluation
LOGS = 20  # points of a curve
RESULT = "result.json"

_PRELOADED = (
    "megatron.core.dist_checkpointing",
    "megatron.core.tokenizers.text",
    "megatron.training",
    "megatron.training.argument_utils",
    "torch.utils.tensorboard",
    "ultramem_megatron.training.gpt_datasets",
    "ultramem_megatron.training.gpt_step",
    "ultramem_megatron.inference.loading",
    "ultramem_megatron.training.pretrain",
)
_ENVIRONMENT = {
    "PYTHONWARNINGS": "ignore",  # Megatron's on what this machine lacks
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}
"""Of the trainings, where the caller's environment says nothing."""


@dataclass(frozen=True)
class Training:
    """A model, a seed, and the data, numbers of steps and of evaluations to train with."""

    model: Model
    seed: int
    steps: int
    evaluations: int
    data: Path
    """Folder made by ultramem_megatron.data.prepare."""
    extra: tuple[str, ...]
    save: bool
    """Keep a checkpoint of the last step."""

    def arguments(self, folder: Path) -> list[str]:
        """The whole command line; what is written goes below `folder`."""
        interval = max(1, self.steps // self.evaluations)
        words = [*self.model.small_arguments(), "--seed", str(self.seed)]
        words += ["--train-iters", str(self.steps), "--eval-interval", str(interval)]
        words += ["--eval-iters", str(EVAL_BATCHES), "--num-workers", "0"]
        words += ["--log-interval", str(max(1, self.steps // LOGS))]
        words += ["--tokenizer-type", "HuggingFaceTokenizer"]
        words += ["--tokenizer-model", str(self.data / "tokenizer")]
        words += ["--train-data-path", str(self.data / "train")]
        words += ["--valid-data-path", str(self.data / "valid")]
        words += ["--data-cache-path", str(folder / "data_index")]
        words += ["--tensorboard-dir", str(folder / "tensorboard")]
        if self.save:
            words += ["--save", str(folder / "checkpoints"), "--save-interval", str(self.steps)]
        return [*words, *self.extra]

    def key(self) -> str:
        """Hash of everything that decides the result: flags and data, wherever they lie."""
        data = json.loads((self.data / "data.json").read_text(encoding="utf-8"))["key"]
        decisive = [data, replace(self, data=Path("data")).arguments(Path("."))]
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]


def train(
    training: Training, runs: Path, measure: Callable[[Path], dict[str, Any]] | None
) -> dict[str, Any]:
    """Trains unless a finished run with the same key is there; returns its record.

    measure: called in a process like the training's with the folder of checkpoints; what it returns
    is added to the record under "measured".

    Raises:
        StageError: the training failed; the message holds the last lines of its log.
    """
    result = runs / training.key() / RESULT
    if result.exists():
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found
    result.parent.mkdir(parents=True, exist_ok=True)
    # New: what an interrupted attempt left, or anybody else, stays beside it.
    folder = Path(tempfile.mkdtemp(prefix="attempt-", dir=result.parent))
    started = time.monotonic()
    name = f"{training.model.name}, seed {training.seed}"
    in_process(name, folder / "train.log", _train, training.arguments(folder))
    record = {"seed": training.seed, "steps": training.steps, **_scalars(folder / "tensorboard")}
    if measure is not None:
        measured = folder / "measured.json"
        in_process(name, folder / "measure.log", _measure, measure, folder, measured)
        record["measured"] = json.loads(measured.read_text(encoding="utf-8"))
    record |= {"seconds": round(time.monotonic() - started, 1), **_circumstances()}
    write_json(record, result)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # all that was needed is measured
    return record


def in_process(name: str, log: Path, function: Callable[..., None], *args: Any) -> None:
    """Calls `function(*args)` in a fresh process with its output in `log`.

    Raises:
        StageError: it raised or died.
    """
    process = _server().Process(target=_main, args=(log, function, args))
    process.start()
    try:
        process.join()
    except BaseException:
        process.terminate()
        raise
    if process.exitcode:
        last = log.read_text(errors="replace").splitlines()[-LAST_LINES:] if log.exists() else []
        raise StageError(f"{name} failed; the last lines of {log}:\n  | " + "\n  | ".join(last))


def _server() -> Any:
    """The fork server's context; the first process started from it pays for the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    ours = dict(os.environ)
    os.environ.update(_ENVIRONMENT | ours)
    try:
        forkserver.ensure_running()  # it and its children keep what stands in the environment now
    finally:
        os.environ.clear()
        os.environ.update(ours)
    return context


def _main(log: Path, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    output = log.open("w", buffering=1, encoding="utf-8")
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = output
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    function(*args)
    output.flush()


def _train(arguments: list[str]) -> None:
    from ultramem_megatron.training.pretrain import main

    print("$ ultramem train", *arguments)
    main(arguments)
    from megatron.training.global_vars import get_tensorboard_writer

    get_tensorboard_writer().flush()  # forked processes end without it


def _measure(measure: Callable[[Path], dict[str, Any]], folder: Path, output: Path) -> None:
    write_json(measure(folder), output)


def _scalars(folder: Path) -> dict[str, Any]:
    """Losses and metrics of memories from TensorBoard events: tag -> [[step, value], ...]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    wanted = [
        tag
        for tag in events.Tags()["scalars"]
        if tag in ("lm loss", "lm loss validation") or tag.startswith("ultramem/")
    ]
    # The last step is evaluated twice, on other batches: the first value is the one whose batches
    # all runs share with the evaluations before it.
    scalars: dict[str, dict[int, list[float]]] = {tag: {} for tag in wanted}
    for tag in wanted:
        for scalar in events.Scalars(tag):
            scalars[tag].setdefault(scalar.step, [scalar.step, scalar.value])
    return {"scalars": {tag: list(points.values()) for tag, points in scalars.items()}}


def _circumstances() -> dict[str, str]:
    """What a number may depend on beside flags and data."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=10", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit or "unknown",
        "torch": metadata.version("torch"),
        "cores": str(os.cpu_count()),
    }
