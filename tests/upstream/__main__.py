"""Upstream's unit tests, a file at a time; called by tests/upstream.sh."""

import argparse
import gc
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.upstream import backend, sandbox
from tests.upstream.group import Plan, run_file
from tests.upstream.reasons import REASONS, Reasons
from tests.upstream.results import FAILED, PASSED, Result, Store, ours, shares, stops
from ultramem_megatron.errors import UltraMemError

_RERUN = 20
"""Failures of a file, at most, that are tried once more, each for itself."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for and not there yet, then print the tables; 1 if a failure is ours."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no rank is left behind
    given = list(sys.argv[1:] if argv is None else argv)
    split = given.index("--") if "--" in given else len(given)
    args = _parser().parse_args(given[:split])
    try:
        reasons = Reasons.read(REASONS.read_text(encoding="utf-8"))
        source = sandbox.checkout(os.environ["MEGATRON_LM_PATH"])
        files = _files(source / "tests/unit_tests", args.paths)
    except UltraMemError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = args.out or Path(f"runs/upstream-ranks{args.ranks}")
    store = Store(out / "results.csv")
    (out / "logs").mkdir(parents=True, exist_ok=True)
    there = {result.file for result in store.read()}
    todo = [file for file in files if file not in there]
    if len(todo) < len(files):
        print(
            f"{len(files) - len(todo)} files are in {store.path} already: delete it to start anew"
        )
    with tempfile.TemporaryDirectory(prefix="upstream_") as folder:
        plan = Plan(
            Path(folder),
            (out / "logs").resolve(),
            args.ranks,
            args.limit,
            int(args.memory_gib * 2**30) // args.ranks,
            tuple(given[split + 1 :]),
        )
        _run(plan, source, todo, store, reasons)
    return _report([r for r in store.read() if r.file in set(files)], reasons)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tests/upstream.sh", description=__doc__)
    parser.add_argument(
        "paths", nargs="*", help="folders or files of upstream's tests/unit_tests; default: all"
    )
    parser.add_argument("--ranks", type=int, default=1, help="processes (default 1)")
    parser.add_argument(
        "--limit", type=float, default=40.0, help="seconds a test, waits for a core aside (40)"
    )
    parser.add_argument(
        "--memory-gib",
        type=float,
        default=16.0,
        help="for all ranks together, stacks of threads too (default 16)",
    )
    parser.add_argument("--out", type=Path, help="folder of results (runs/upstream-ranksN)")
    return parser


def _files(tests: Path, paths: Sequence[str]) -> list[str]:
    found: list[str] = []
    for path in paths or ["."]:
        place = tests / path
        files = [place] if place.is_file() else sorted(place.rglob("test_*.py"))
        if not files:
            raise UltraMemError(f"{path}: no tests there. Name folders or files of {tests}.")
        found += [str(file.relative_to(tests)) for file in files]
    return [file for file in dict.fromkeys(found) if file != "test_utilities.py"]


def _run(plan: Plan, source: Path, files: Sequence[str], store: Store, reasons: Reasons) -> None:
    if not files:
        return
    sandbox.fill(plan.sandbox, source)
    backend.prepare()
    gc.freeze()  # what is imported by now: ranks need not look through it, nor copy it
    for number, file in enumerate(files, 1):
        results = _again(plan, file, run_file(plan, file), reasons)
        # A file without tests is remembered too.
        store.add(results or [Result(file, "skipped", "no tests selected")])
        count = Counter(result.outcome for result in results)
        bad = len(ours(results, reasons))
        print(
            f"{number}/{len(files)} {file}: {count[PASSED]} passed, {count['skipped']} skipped, "
            f"{count[FAILED] - bad} stopped, {bad} ours",
            flush=True,
        )


def _again(plan: Plan, file: str, results: list[Result], reasons: Reasons) -> list[Result]:
    """Failures that are ours, tried without the others, then each alone.

    One can be what a test before it left behind.
    """
    left = _failures(results, reasons)
    if 1 < len(left) < len(results):
        results = _replaced(results, run_file(plan, file, left))
    for test in _failures(results, reasons)[:_RERUN]:
        if len(results) > 1:
            results = _replaced(results, run_file(plan, file, [test]))
    return results


def _failures(results: list[Result], reasons: Reasons) -> list[str]:
    return [result.test for result in ours(results, reasons) if "::" in result.test]


def _replaced(results: list[Result], again: list[Result]) -> list[Result]:
    of = {result.test: result for result in again}
    return [of.get(result.test, result) for result in results]


def _report(results: list[Result], reasons: Reasons) -> int:
    failures = ours(results, reasons)
    for failure in failures:
        print(f"ours: {failure.test}\n      {failure.error}")
    print(f"\n{shares(results, reasons)}\n\n{stops(results, reasons)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
