"""Every case of the recipe matrix again: flags of Megatron's with memory layers and without.

    ultramem bench recipes --out tests/recipes/matrix.csv            # about an hour on 2 cores
    ultramem bench recipes --out cases.csv --only 'muon|latent'      # cases by name

A case is a line of tests/recipes/cases.txt: name, ranks, the case that it must equal, flags. Its
row says what came of it, with memories and without: the losses, the refusal, or the error that
Megatron ends in. A case that fails with memories alone, or has other losses than the one that it
must equal though it has them without memories, is a fault.
"""

import argparse
import functools
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
from ultramem_megatron.faults.results_folder import results_folder
from ultramem_megatron.tools import rows

CASES = Path(__file__).parents[2] / "tests" / "recipes" / "cases.txt"
_PRELOADED = "tests.preloaded"
"""Imported once, in the process that all ranks are forked from; it stands beside the list."""
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
_CLOSE = 2e-5  # of losses around 6, in float32
FIELDS = ("name", "ranks", "equal to", "flags", "outcome", "with memories", "without")


class Case(NamedTuple):
    """One line of the list; runs that follow each other are separated by ";"."""

    name: str
    ranks: str
    equal: str
    flags: str


class Outcome(NamedTuple):
    """ "losses: ...", "refused: ..." or "fails: ..." of a case, with memories and without."""

    memories: str
    without: str


def main(argv: Sequence[str] | None = None) -> None:
    """Try the cases and write the table. Raises UltraMemError for a wrong --only or list."""
    parser = CommandParser(prog="ultramem bench recipes", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="the CSV to write")
    parser.add_argument(
        "--only",
        default="",
        metavar="REGEX",
        help="cases whose names match; what OUT says of others stays",
    )
    options = parser.parse_args(argv)
    cases = {case.name: case for case in read_cases()}
    chosen = [case for case in cases.values() if re.search(options.only, case.name)]
    if not chosen:
        raise UltraMemError(f"--only {options.only}: no case has such a name. See {CASES.name}.")
    results_folder(options.out.parent)
    shown = _rows_there(options.out) if options.only else {}
    try_once = functools.cache(try_case)
    for case in chosen:
        found = try_once(case)
        verdict = judge(found, try_once(cases[case.equal]) if case.equal else None)
        values = (case.name, case.ranks, case.equal, case.flags, verdict, *found)
        shown[case.name] = dict(zip(FIELDS, values, strict=True))
        rows.write(options.out, [shown[name] for name in cases if name in shown])
        print(f"{verdict:<8} {case.name}", flush=True)


def _rows_there(file: Path) -> dict[str, rows.Row]:
    """By name, those of a table that was written before; UltraMemError if it is something else."""
    if not file.exists():
        return {}
    return {row["name"]: row for row in rows.read(file, "ultramem bench recipes", FIELDS)}


def read_cases() -> Iterator[Case]:
    """The list, without its comments."""
    for line in CASES.read_text().splitlines():
        if line and not line.startswith("#"):
            yield Case(*(part.strip() for part in line.split("|", 3)))


def try_case(case: Case) -> Outcome:
    """What comes of it."""
    return Outcome(_runs(case, [*_TINY, *_MEMORIES]), _runs(case, _TINY))


def judge(found: Outcome, expected: Outcome | None) -> str:
    """works, refused, upstream (fails without memories too), DIFFERS or FAILS."""
    kind = found.memories.split(":")[0]
    if kind == "fails":
        return "upstream" if found.without.startswith("fails") else "FAILS"
    if kind == "losses" and expected is not None and not _close(*found, *expected):
        return "DIFFERS"
    return {"losses": "works"}.get(kind, kind)


def _close(memories: str, without: str, expected: str, expected_without: str) -> bool:
    """Whether losses agree, or do not agree without memories either, where Megatron has both."""
    plain = (without, expected_without)
    both = all(outcome.startswith("losses") for outcome in plain)
    return _agree(memories, expected) or (both and not _agree(*plain))


def _agree(found: str, expected: str) -> bool:
    if not found.startswith("losses") or not expected.startswith("losses"):
        return found == expected
    pairs = zip(found.split()[1:], expected.split()[1:], strict=False)
    alike = len(found.split()) == len(expected.split())
    return alike and all(abs(float(a) - float(b)) < _CLOSE for a, b in pairs)


def _runs(case: Case, words: list[str]) -> str:
    """The last run's outcome, or that of the first which ends otherwise than in losses."""
    outcome = ""
    with tempfile.TemporaryDirectory() as folder:
        for ranks, flags in zip(case.ranks.split(";"), case.flags.split(" ; "), strict=True):
            own = shlex.split(flags.replace("{folder}", folder))
            outcome = _run(int(ranks), [*words, *own]).replace(folder, "{folder}")
            if not outcome.startswith("losses"):
                break
    return outcome


def _run(ranks: int, words: list[str]) -> str:
    """ "losses: ...", "refused: ..." or "fails: ..."."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PRELOADED])
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
        ended = _join(started)
        outputs = [(folder / f"{rank}").read_text(errors="replace") for rank in range(ranks)]
    return _outcome(outputs) if ended else f"fails: not done after {_LIMIT} s"


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


def _join(processes: list[Any]) -> bool:
    """Whether they have all ended, by themselves or because one failed."""
    running, limit = list(processes), _LIMIT
    failed = False
    while running:
        if not wait([process.sentinel for process in running], limit):
            break
        failed = any(process.exitcode for process in processes)
        limit = _GRACE if failed else limit
        running = [process for process in running if process.exitcode is None]
    for process in running:
        process.kill()
    for process in processes:
        process.join()
    return failed or not running


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
