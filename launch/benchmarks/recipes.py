"""Every case of the recipe matrix again: flags of Megatron's with memory layers and without.

    ultramem bench recipes --out tests/recipes/matrix.csv            # about an hour on 2 cores
    ultramem bench recipes --out cases.csv --only 'muon|latent'      # cases by name

A case is a line of tests/recipes/cases.txt: name, ranks, flags. Its row says what came of it, with
memories and without: the losses, the refusal, or the error that Megatron ends in.
"""

import argparse
import csv
import multiprocessing
import os
import re
import shlex
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from ultramem_megatron.errors import CommandParser, UltraMemError, exit_on_user_error

CASES = Path(__file__).parents[2] / "tests" / "recipes" / "cases.txt"
_PRELOADED = (
    "megatron.core.dist_checkpointing",
    "megatron.core.tokenizers.text",
    "megatron.training.argument_utils",
    "ultramem_megatron.training.pretrain",
    "ultramem_megatron.training.gpt_datasets",
    "ultramem_megatron.training.gpt_step",
)
"""Imported once, in the process that all ranks are forked from."""
_LIMIT = 120  # seconds that a case may take
_GRACE = 3  # seconds that ranks may go on after one has failed; they wait for it for ever
_TINY = shlex.split(
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 "
    "--max-position-embeddings 32 --position-embedding-type rope --hidden-dropout 0 "
    "--attention-dropout 0 --untie-embeddings-and-output-weights --micro-batch-size 2 "
    "--adam-eps 1e-5 "  # above rounding, so that layouts can be compared
    "--global-batch-size 8 --train-iters 3 --lr 1e-3 --min-lr 1e-4 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 512 --num-workers 0 --log-interval 1 "
    "--eval-iters 0 --eval-interval 1000"
)
_MEMORIES = shlex.split(
    "--ultramem-spans 1:2/3:4 --ultramem-num-keys 12 --ultramem-topk 6 "
    "--ultramem-query-conv-kernel 3"
)
_LOSS = re.compile(r"lm loss: (\S+)")
FIELDS = ("name", "ranks", "flags", "outcome", "with memories", "without")


class Case(NamedTuple):
    """One line of the list."""

    name: str
    ranks: int
    flags: str


def main(argv: Sequence[str] | None = None) -> None:
    """Try the cases and write the table. Raises UltraMemError for a wrong --only or list."""
    parser = CommandParser(prog="ultramem bench recipes", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="the CSV to write")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose names match")
    options = parser.parse_args(argv)
    chosen = [case for case in read_cases() if re.search(options.only, case.name)]
    if not chosen:
        raise UltraMemError(f"--only {options.only}: no case has such a name. See {CASES.name}.")
    with open(options.out, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for case in chosen:
            row = try_case(case)
            writer.writerow(row)
            file.flush()
            print(f"{row['outcome']:<8} {case.name}", flush=True)


def read_cases() -> Iterator[Case]:
    """The list, without its comments."""
    for line in CASES.read_text().splitlines():
        if line and not line.startswith("#"):
            name, ranks, flags = (part.strip() for part in line.split("|", 2))
            yield Case(name, int(ranks), flags)


def try_case(case: Case) -> dict[str, str]:
    """Its row of the table."""
    flags = shlex.split(case.flags)
    memories = _run(case.ranks, [*_TINY, *_MEMORIES, *flags])
    without = _run(case.ranks, [*_TINY, *flags])
    kind = memories.split(":")[0]
    outcome = {"losses": "works", "refused": "refused"}.get(kind) or (
        "upstream" if not without.startswith("losses") else "FAILS"
    )
    shown = (case.name, str(case.ranks), case.flags, outcome, memories, without)
    return dict(zip(FIELDS, shown, strict=True))


def _run(ranks: int, words: list[str]) -> str:
    """ "losses: ...", "refused: ..." or "fails: ..."."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    with tempfile.TemporaryDirectory() as name, socket.socket() as probe:
        folder = Path(name)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        world = {
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        started: list[Any] = []
        for rank in range(ranks):
            own = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(context.Process(target=_rank, args=(words, folder / f"{rank}", own)))
            started[-1].start()
        _join(started)
        outputs = [(folder / f"{rank}").read_text(errors="replace") for rank in range(ranks)]
    return _outcome(outputs)


def _rank(words: list[str], output: Path, environment: dict[str, str]) -> None:
    """Body of one rank; what it prints and raises goes to a file."""
    import torch

    from ultramem_megatron.training import pretrain

    torch.set_num_threads(1)
    os.environ.update(environment)
    sys.stdout = sys.stderr = open(output, "w", buffering=1)  # noqa: SIM115 - for the whole process
    try:
        pretrain.main(words)
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def _join(processes: list[Any]) -> None:
    running, limit = list(processes), _LIMIT
    while running:
        if not wait([process.sentinel for process in running], limit):
            break
        limit = _GRACE if any(process.exitcode for process in processes) else limit
        running = [process for process in running if process.exitcode is None]
    for process in running:
        process.kill()
    for process in processes:
        process.join()


def _outcome(outputs: list[str]) -> str:
    text = "\n".join(outputs)
    refusal = re.search(r"^\S*UltraMemError: (.*)$", text, re.MULTILINE)
    if refusal:
        return f"refused: {refusal[1]}"
    error = re.search(r"^(\w[\w.]*(?:Error|Exception)\b.*)$", text, re.MULTILINE)
    if error:
        return f"fails: {error[1]:.200}"
    losses = _LOSS.findall(outputs[-1])
    return f"losses: {' '.join(losses)}" if losses else "fails: no step was logged"


if __name__ == "__main__":
    with exit_on_user_error():
        main()
