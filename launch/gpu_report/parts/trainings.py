"""Small trainings by `ultramem train`, which must agree: kernels, wrappers, a resumed run."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from launch.gpu_report.row import Row, attempted

_SECONDS = 120
_TINY = (
    "--num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 128 "
    "--max-position-embeddings 128 --position-embedding-type rope --hidden-dropout 0 "
    "--attention-dropout 0 --micro-batch-size 4 --global-batch-size 8 --lr 1e-3 "
    "--lr-decay-iters 100 --mock-data --tokenizer-type NullTokenizer --vocab-size 1000 "
    "--eval-iters 0 --eval-interval 1000 --log-interval 1 --ultramem-spans 1:3 "
    "--ultramem-num-keys 40 --ultramem-topk 16 --train-iters"
)
_EQUAL = {
    "as it is": "",
    "kernels of PyTorch": "ULTRAMEM_KERNELS=torch",
    "the reference's kernels": "ULTRAMEM_KERNELS=reference",
    "overlap": "--ultramem-overlap",
    "recomputed": "--recompute-granularity full --recompute-method uniform "
    "--recompute-num-layers 1",
    "deterministic": "--deterministic-mode",
    "distributed optimizer": "--use-distributed-optimizer",
    "tables in host memory": "--ultramem-table-memory host",
}
"""Name -> flags, or a variable: the losses of each are those of the first."""
_OWN = {"bfloat16": "--bf16", "float16": "--fp16 --initial-loss-scale 65536"}
"""By default the loss is scaled so high that all of these steps would be left out."""


def rows(large: bool) -> Iterator[Row]:
    """Losses, and how far they are from the plain run's."""
    steps = 10 if large else 2
    plain: list[float] = []
    for name, words in _EQUAL.items() if large else list(_EQUAL.items())[:2]:
        found: list[float] = []
        yield from attempted(f"training, {name}", partial(_loss, name, words, steps, found))
        plain = plain or found
        if found and found is not plain:
            furthest = max(abs(a - b) for a, b in zip(plain, found, strict=True))
            yield Row(what=f"training, {name}, furthest from plain", value=furthest, unit="nats")
    if large:
        for name, words in _OWN.items():
            yield from attempted(f"training, {name}", partial(_loss, name, words, steps, []))
        yield from attempted("training, resumed", partial(_resumed, steps, plain))


def _loss(name: str, words: str, steps: int, found: list[float]) -> Iterator[Row]:
    found += _losses(words, steps)
    yield Row(what=f"training, {name}, last of {steps} losses", value=found[-1], unit="nats")


def _resumed(steps: int, plain: list[float]) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        half = steps // 2
        _losses(f"--save {folder} --save-interval {half} --exit-interval {half}", steps)
        rest = _losses(f"--load {folder}", steps)
    furthest = max(abs(a - b) for a, b in zip(plain[half:], rest, strict=True))
    yield Row(what="training, resumed, furthest from plain", value=furthest, unit="nats")


def _losses(words: str, steps: int) -> list[float]:
    given = words.split()
    variables = dict(word.split("=") for word in given if "=" in word)
    flags = [word for word in given if "=" not in word]
    command = [sys.executable, "-m", "ultramem_megatron", "train", *_TINY.split(), str(steps)]
    root = str(Path(__file__).parents[3])
    env = {**os.environ, **variables, "PYTHONPATH": root, "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [*command, "--data-cache-path", cache, *flags],
            env=env,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    if done.returncode:
        raise RuntimeError(" / ".join((done.stdout + done.stderr).splitlines()[-3:]))
    return [float(loss) for loss in re.findall(r"lm loss: (\S+)", done.stdout)]
