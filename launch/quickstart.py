"""Trains a small UltraMem GPT on real text, resumes it, samples from it and reports.

    bash launch/quickstart.sh [--text PATH] [--output DIR] [--steps N] [-- MEGATRON FLAGS]

The output folder then holds data/ (kept for the next call), checkpoints/, tensorboard/, logs/,
loss.png, sample.txt and summary.json. Every call trains afresh; --continue finishes a run that
was interrupted.
"""

import argparse
import fcntl
import json
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from launch import recipe, report, stage
from launch.products import PRODUCTS, SETTINGS, read_settings, remove_products
from ultramem_megatron.data import prepare
from ultramem_megatron.data.own_folder import entries
from ultramem_megatron.errors import UltraMemError

ROOT = Path(__file__).resolve().parents[1]
STDLIB_PROMPT = "import os\n\ndef "
PROMPT_TOKENS = 12  # of the validation text, where the text is the user's own


@dataclass
class Run:
    """One call of the quickstart: what to do, where, and how long each stage took."""

    args: argparse.Namespace
    recipe: recipe.Recipe
    folder: Path
    ranks: int
    seconds: dict[str, float] = field(default_factory=dict)  # wall time by stage
    settings: dict[str, Any] = field(default_factory=dict)  # of settings.json, once it is ours

    @property
    def checkpoints(self) -> Path:
        """Where Megatron saves and loads."""
        return self.folder / "checkpoints"

    @contextmanager
    def stage(self, name: str, announcement: str) -> Iterator[None]:
        """Announces a stage, takes its time and lists the files that it made."""
        print(f"== {announcement}", flush=True)
        started = time.monotonic()
        before = entries(self.folder, PRODUCTS)
        try:
            yield
        finally:
            if self.settings:
                made = entries(self.folder, PRODUCTS) - before
                self.settings["made"] = sorted({*self.settings["made"], *made})
                report.write_json(self.settings, self.folder / SETTINGS)
        self.seconds[name] = round(time.monotonic() - started, 1)


def build_parser() -> argparse.ArgumentParser:
    """The command line of `launch/quickstart.sh`."""
    parser = argparse.ArgumentParser(
        prog="bash launch/quickstart.sh",
        description="Train a small UltraMem GPT on real text, resume it, sample from it, report.",
        epilog="Flags after -- go to Megatron as they are, for example: -- --lr 1e-3",
    )
    add = parser.add_argument
    add("--text", type=Path, help="UTF-8 file or folder (default: Python's standard library)")
    add(
        "--output",
        type=Path,
        default=Path(os.path.relpath(ROOT / "runs" / "quickstart")),
        help="folder for everything that is made (default: runs/quickstart)",
    )
    add("--steps", type=int, help=f"optimizer steps in all (default: {recipe.STEPS})")
    add("--prompt", help="what the sample begins with")
    add("--ranks", type=int, help="processes (default: 2, or 1 on a machine with a single GPU)")
    add("--tiny", action="store_true", help="a model of a few thousand weights, to try the steps")
    add(
        "--continue",
        dest="finish",
        action="store_true",
        help="finish the interrupted run in the output folder instead of starting afresh",
    )
    add("extra", nargs="*", metavar="-- FLAGS", help="Megatron's and --ultramem-* flags")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the quickstart; returns its exit status."""
    args = build_parser().parse_args(argv)
    try:
        sizes = recipe.make_recipe(tiny=args.tiny, steps=args.steps, extra=tuple(args.extra))
        run = Run(args, sizes, args.output, choose_ranks(args.ranks))
        with open_folder(run):
            quickstart(run)
    except (UltraMemError, stage.StageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ninterrupted; --continue finishes the run in {args.output}", file=sys.stderr)
        return 130
    return 0


def quickstart(run: Run) -> None:
    """All stages in order."""
    started = time.monotonic()
    setup_seconds = float(os.environ.get("QUICKSTART_SETUP_SECONDS", "0"))
    run.seconds["setup"] = setup_seconds
    with run.stage("data", "1/5 text, tokenizer, dataset"):
        data = prepare.prepare(run.args.text, run.folder / "data", run.recipe.vocab_size)
    start_afresh_or_continue(run, data)
    steps, resume_at = run.recipe.steps, run.recipe.resume_at
    with run.stage("train", f"2/5 training up to step {resume_at}, saving a checkpoint"):
        train(run, "train", after=0, upto=resume_at)
    with run.stage("resume", f"3/5 resuming from the checkpoint, up to step {steps}"):
        train(run, "resume", after=resume_at, upto=steps)
    with run.stage("sample", "4/5 sampling text"):
        prompt, text = sample(run, data)
    with run.stage("report", "5/5 loss curve and summary"):
        summary = summarize(run, data, prompt, text)
    run.seconds["total"] = round(setup_seconds + time.monotonic() - started, 1)
    report.write_json(summary, run.folder / "summary.json")
    print(describe(run, summary))


def choose_ranks(asked: int | None) -> int:
    """Number of processes: two, but never two on one GPU."""
    if asked is not None:
        if asked < 1:
            raise UltraMemError(f"--ranks {asked}: must be at least 1.")
        return asked
    if not Path("/dev/nvidiactl").exists():  # spares the import below
        return 2
    import torch

    return 1 if torch.cuda.device_count() == 1 else 2


@contextmanager
def open_folder(run: Run) -> Iterator[None]:
    """Makes the run folder, refusing one that is not ours or in use by another quickstart."""
    folder = run.folder
    if folder.is_dir():
        own = {*PRODUCTS, SETTINGS, "data", "data_index"}
        foreign = {item.name for item in folder.iterdir()} & own
        if foreign and not (folder / ".quickstart").exists():
            raise UltraMemError(
                f"--output {folder}: has {', '.join(sorted(foreign))}, but not from a quickstart. "
                "Give a new or an empty folder."
            )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".quickstart").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UltraMemError(
                f"--output {folder}: another quickstart is at work there. "
                "Wait for it, or give another folder."
            ) from None
        yield


def start_afresh_or_continue(run: Run, data: prepare.Prepared) -> None:
    """Removes an earlier run's products, or makes sure that they fit the run to be continued.

    Raises:
        UltraMemError: --continue, and there is nothing to continue or it had other settings; or
            there are files in the way that no stage of an earlier run has made.
    """
    settings = json.loads(json.dumps({**asdict(run.recipe), "ranks": run.ranks, "data": data.key}))
    earlier = read_settings(run.folder / SETTINGS)
    if not run.args.finish:
        remove_products(run.folder, earlier["made"])
        run.settings = {**settings, "made": []}
        report.write_json(run.settings, run.folder / SETTINGS)
        return
    if earlier.keys() == {"made"}:
        raise UltraMemError(f"--continue: no run in {run.folder}. Leave out --continue.")
    if differing := sorted(name for name in settings if settings[name] != earlier.get(name)):
        raise UltraMemError(
            f"--continue: the run in {run.folder} had another {', '.join(differing)} "
            f"({'; '.join(f'{n}: {earlier.get(n)} then, {settings[n]} now' for n in differing)}). "
            "Give the same options as then, or leave out --continue to train afresh."
        )
    run.settings = earlier


def train(run: Run, name: str, after: int, upto: int) -> None:
    """Trains from step `after` to step `upto` in processes of their own.

    Raises:
        StageError: training failed, or did not start or stop where it should.
    """
    latest = report.latest_checkpoint(run.checkpoints)
    if latest is not None and latest[0] >= upto:
        print(f"  already at step {latest[0]}")
        return
    command = [
        *launcher(run.ranks),
        "-m",
        "ultramem_megatron.training.pretrain",
        *run.recipe.arguments(run.folder / "data", run.folder),
    ]
    if upto < run.recipe.steps:
        command += ["--exit-interval", str(upto)]
    if after:
        command += ["--load", str(run.checkpoints)]
    progress = stage.TrainingProgress(run.recipe.tokens_per_step)
    log = run.folder / "logs" / f"{name}.log"
    stage.run(name, command, log, environment(run.ranks), progress)
    reached = report.latest_checkpoint(run.checkpoints)
    if progress.first_step != after + 1 or reached is None or reached[0] != upto:
        raise stage.StageError(
            f"stage '{name}' should train from step {after + 1} and save step {upto}, but began "
            f"with {progress.first_step} and saved {reached and reached[0]}; see {log}."
        )


def launcher(ranks: int) -> list[str]:
    """torchrun for one machine; the loopback address needs no working host name."""
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nproc-per-node", str(ranks)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
    ]


def environment(ranks: int) -> dict[str, str]:
    """Environment of the training processes; what the user has set stands."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    return {
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        **os.environ,
        "PYTHONUNBUFFERED": "1",  # else progress comes in bursts
    }


def sample(run: Run, data: prepare.Prepared) -> tuple[str, str]:
    """Lets the trained model go on from a prompt; returns the prompt and the text."""
    prompt = run.args.prompt or choose_prompt(run, data)
    command = [sys.executable, "-m", "ultramem_megatron.inference.generate"]
    command += ["--load", str(run.checkpoints), "--prompt", prompt]
    command += ["--tokens", str(run.recipe.sample_tokens)]
    file = run.folder / "sample.txt"
    stage.run("sample", command, run.folder / "logs" / "sample.log", environment(1), output=file)
    text = file.read_text(encoding="utf-8").strip("\n")
    print("\n".join(f"  | {line}" for line in text.splitlines()))
    return prompt, text


def choose_prompt(run: Run, data: prepare.Prepared) -> str:
    """The beginning of the validation text, or of a Python module for Python's sources."""
    if run.args.text is None:
        return STDLIB_PROMPT
    import numpy as np
    from tokenizers import Tokenizer

    width = np.uint16 if data.vocab_size < 65_500 else np.int32  # as the dataset is written
    tokens = np.fromfile(run.folder / "data" / "valid.bin", dtype=width, count=PROMPT_TOKENS)
    tokenizer = Tokenizer.from_file(str(run.folder / "data" / "tokenizer" / "tokenizer.json"))
    words = tokenizer.decode(tokens.tolist()).rpartition(" ")  # the last may be half a word
    return words[0] or words[2]


def summarize(run: Run, data: prepare.Prepared, prompt: str, text: str) -> dict[str, Any]:
    """Draws the curve and collects the numbers of summary.json."""
    curves = report.read_curves(run.folder / "tensorboard")
    resume_at = run.recipe.resume_at
    report.plot(curves, data.unigram_entropy, resume_at, run.folder / "loss.png")
    latest = report.latest_checkpoint(run.checkpoints)
    assert latest is not None, "train() has checked that it saved"
    return {
        "loss": {
            "unit": "nats per token",
            "first": curves.train[0].value,
            "last": curves.train[-1].value,
            "validation": curves.valid[-1].value,
            "unigram_entropy": data.unigram_entropy,
            "unigram_cross_entropy_valid": data.unigram_cross_entropy_valid,
        },
        "steps": curves.train[-1].step,
        "resumed_at_step": resume_at,
        "parameters": report.count_parameters(latest[1]),
        "tokens_per_second": round(
            report.tokens_per_second(curves.train, run.recipe.tokens_per_step, resume_at)
        ),
        "seconds": run.seconds,
        "sample": {"prompt": prompt, "text": text},
        "config": {**asdict(run.recipe), "ranks": run.ranks},
        "data": {name: value for name, value in asdict(data).items() if name != "sizes"},
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "megatron-core")},
        },
    }


def describe(run: Run, summary: dict[str, Any]) -> str:
    """The last lines a newcomer reads."""
    loss, parameters, seconds = summary["loss"], summary["parameters"], summary["seconds"]
    below = loss["unigram_entropy"] - loss["validation"]
    where = f"{abs(below):.2f} {'below' if below > 0 else 'above'}"
    stages = ", ".join(f"{n} {s:.0f} s" for n, s in seconds.items() if n != "total")
    return f"""
  loss         {loss["first"]:.2f} at step 1, {loss["last"]:.2f} at step {summary["steps"]}
  validation   {loss["validation"]:.2f} nats per token, {where} the unigram entropy \
({loss["unigram_entropy"]:.2f})
  parameters   {parameters["dense"]:,} dense + {parameters["sparse"]:,} in value tables
  speed        {summary["tokens_per_second"]:,} tokens per second on {run.ranks} rank(s)
  time         {seconds["total"]:.0f} s: {stages}
  everything   {run.folder}/: summary.json, loss.png, sample.txt, logs/, checkpoints/
  curves       .venv/bin/tensorboard --logdir {shlex.quote(str(run.folder / "tensorboard"))}
"""


if __name__ == "__main__":
    # Ended from outside as by Ctrl-C: the ranks must end too.
    for end in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(end, signal.default_int_handler)
    sys.exit(main())
