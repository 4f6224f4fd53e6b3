"""`tests/upstream.sh`: what is refused, what a reason covers, and ranks that hang."""

import os
import subprocess
from pathlib import Path

import pytest

from tests import ROOT
from tests.ranks import init_gloo, run_on_ranks
from tests.upstream import __main__ as command
from tests.upstream import sandbox
from tests.upstream.reasons import REASONS, Reasons
from tests.upstream.results import Result, Store, ours, shares, stops
from ultramem_megatron.errors import UltraMemError

LIST = """
# a comment
[more ranks are needed]
RuntimeError: world size \\(\\d+\\) is not divisible by
[no engine]
ssm/ :: ImportError: Engine
"""
RESULTS = [
    Result("a/test_x.py::test_1", "passed"),
    Result("a/test_x.py::test_2", "failed", "RuntimeError: world size (1) is not divisible by 4"),
    Result("a/test_x.py::test_3", "failed", "ImportError: Engine @ megatron/core/x.py:f"),
    Result("ssm/test_y.py::test_1", "failed", "ImportError: Engine @ megatron/core/x.py:f"),
    Result("test_z.py::test_1", "skipped", "needs eight"),
]
TESTS_OF_TWO_RANKS = """
import os, threading, time
rank = int(os.environ["RANK"])
def test_first():
    end = threading.Event()
    for _ in range(600): threading.Thread(target=end.wait).start()
    end.set()
def test_waits_for_a_rank_that_failed():
    assert rank == 0
    time.sleep(600)
def test_hangs():
    if rank: time.sleep(600)
async def test_last(tmp_path): assert tmp_path.exists()
def test_dies():
    if rank: os._exit(9)
def test_after():
    from tests.unit_tests.test_utilities import Utils
    assert Utils.started
"""
UTILITIES = """
class Utils:
    started = False
    @staticmethod
    def initialize_distributed(): Utils.started = True
"""


def test_only_what_a_reason_matches_from_its_start_is_not_ours():
    reasons = Reasons.read(LIST)
    assert [result.test for result in ours(RESULTS, reasons)] == ["a/test_x.py::test_3"]
    assert reasons.covering("ssm/test_y.py::t", "TypeError: ImportError: Engine") is None


def test_shares_are_of_what_nothing_external_stops():
    reasons = Reasons.read(LIST)
    assert shares(RESULTS, reasons).splitlines()[2:] == [
        "| `.` | 0 | 1 | 0 | 0 | - |",
        "| `a` | 1 | 0 | 1 | 1 | 50.0 % |",
        "| `ssm` | 0 | 0 | 1 | 0 | - |",
        "| all | 1 | 1 | 2 | 1 | 50.0 % |",
    ]
    assert "| more ranks are needed | 1 |" in stops(RESULTS, reasons)


@pytest.mark.parametrize(
    ("text", "problem"), [("TypeError: x", "under no"), ("[why]\nTypeError: (", "regular")]
)
def test_a_line_that_cannot_be_read_is_named(text: str, problem: str):
    with pytest.raises(UltraMemError, match=rf"reasons.txt, line \d: 'TypeError.* {problem}"):
        Reasons.read(text)


def test_no_reason_covers_every_error():
    reasons = Reasons.read(REASONS.read_text(encoding="utf-8"))
    for name in ("RuntimeError", "TypeError", "AssertionError", "KeyError", "AttributeError"):
        for message in ("", " ", " something", " 'step'"):
            error = f"{name}:{message} @ megatron/core/optimizer/optimizer.py:step"
            assert reasons.covering("distributed/test_x.py::test_1", error) is None


def test_results_are_kept(tmp_path: Path):
    store = Store(tmp_path / "results.csv")
    store.add(RESULTS[:2])
    store.add(RESULTS[2:])
    assert store.read() == RESULTS


def test_a_missing_checkout_is_refused(tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if name != "MEGATRON_LM_PATH"}
    run = subprocess.run(
        ["bash", str(ROOT / "tests/upstream.sh")], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 2
    assert run.stderr.startswith("error: MEGATRON_LM_PATH is not set.")
    assert run.stderr.count("\n") == 1
    with pytest.raises(UltraMemError, match="holds no tests/unit_tests"):
        sandbox.checkout(str(tmp_path))


def test_what_another_test_left_behind_is_tried_without_it(monkeypatch: pytest.MonkeyPatch):
    """All of them at once: there may be more than are tried alone."""
    calls: list[list[str]] = []

    def run_file(_plan: object, _file: str, wanted: list[str]) -> list[Result]:
        calls.append(wanted)
        return [Result(test, "passed") for test in wanted]

    monkeypatch.setattr(command, "run_file", run_file)
    tests = ["a.py::first", *(f"a.py::t{number}" for number in range(30))]
    results = [Result(tests[0], "passed"), *(Result(test, "failed", "E: x") for test in tests[1:])]
    again = command._again(None, "a.py", results, Reasons([]))  # type: ignore[arg-type]  # no plan
    assert calls == [tests[1:]]
    assert {result.outcome for result in again} == {"passed"}
    assert [result.test for result in again] == tests


def _threads_of_ten_groups() -> int:
    import torch.distributed

    from tests.upstream import backend

    backend.prepare()
    init_gloo()
    before = len(os.listdir("/proc/self/task"))
    groups = [torch.distributed.new_group([0]) for _ in range(10)]
    return (len(os.listdir("/proc/self/task")) - before) // len(groups)


def test_groups_that_upstream_forgets_do_not_wake_a_thread_each():
    """Two of a group wait for work; the third, of a device of its own, would poll."""
    assert run_on_ranks(1, _threads_of_ten_groups) == [2]


def _run(folder: Path) -> list[tuple[str, str, str]]:
    from tests.upstream import group

    group._GRACE_SECONDS = 0.5
    plan = group.Plan(folder, folder, ranks=2, limit=2.0, memory=2**32)
    return [
        (result.test.partition("::")[2], result.outcome, result.error[:14])
        for result in group.run_file(plan, "test_two.py")
    ]


def test_ranks_that_hang_or_die_are_ended_and_the_next_test_runs(tmp_path: Path):
    tests = tmp_path / "tests/unit_tests"
    scripts = tmp_path / "tests/test_utils/python_scripts"
    for folder in (tests, scripts, tmp_path / "tmp"):
        folder.mkdir(parents=True)
    (scripts / "download_unit_tests_dataset.py").touch()
    (tests / "test_two.py").write_text(TESTS_OF_TWO_RANKS)
    (tests / "test_utilities.py").write_text(UTILITIES)
    assert run_on_ranks(1, _run, tmp_path)[0] == [
        ("test_first", "passed", ""),
        ("test_waits_for_a_rank_that_failed", "failed", "AssertionError"),
        ("test_hangs", "failed", "TimeLimit: mor"),
        ("test_last", "passed", ""),
        ("test_dies", "failed", "Died: with sta"),
        ("test_after", "passed", ""),
    ]
