"""The tests of one file on several ranks: whatever hangs, dies or loses its partner is ended.

Each rank is a fork of this process that runs pytest on the file. A test ends in the first failure
of any of its ranks. After one that fails on some ranks only, or is cut off, the others can wait for
what never comes: all ranks are killed then, and new ones go on with the tests that are left.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.ranks import free_port
from tests.upstream import sandbox
from tests.upstream.recorder import Recorder
from tests.upstream.results import FAILED, PASSED, SKIPPED, Result

_GRACE_SECONDS = 5.0
"""How long the other ranks may go on in a test that has failed on one."""
_POLL_SECONDS = 0.05
_START_SECONDS = 60.0
"""To import a file of tests."""
_STACK_BYTES = 2**20
"""Of a thread. Groups have two or more each and stay until their rank ends: with 8 MiB each, as is
usual, four tests on four ranks were what 4 GiB a rank have room for."""


@dataclass(frozen=True)
class Plan:
    """How files are run."""

    sandbox: Path
    logs: Path
    ranks: int
    limit: float
    """Seconds a test may take, not counting those in which a rank waits for a core."""
    memory: int
    """Bytes that a rank may allocate."""
    pytest_args: tuple[str, ...] = ()


@dataclass
class _Rank:
    pid: int
    events: Path
    tests: list[str] = field(default_factory=list)
    done: dict[str, Result] = field(default_factory=dict)
    ended_at: dict[str, float] = field(default_factory=dict)
    at: str | None = None
    since: float = 0.0
    status: int | None = None
    _read: int = 0

    def poll(self, now: float) -> None:
        """Read what the rank has written, and whether it lives. now: seconds of the clock."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        if not self.events.exists():
            return
        text = self.events.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        for line in whole[self._read :].splitlines():
            self._take(json.loads(line), now)
        self._read = len(whole)

    def _take(self, event: dict, now: float) -> None:
        if "tests" in event:
            self.tests = event["tests"]
        elif "at" in event:
            self.at = event["at"]
        else:
            name = event["done"]
            self.done[name] = Result(name, event["outcome"], event["error"], event["seconds"])
            self.ended_at[name], self.at = now, None
        self.since = now

    def order(self, test: str) -> int:
        """Where a test stands among those of the rank."""
        return self.tests.index(test) if test in self.tests else -1


class _Clock:
    """Seconds in which no rank waited for a core, so that a busy machine cuts nothing off."""

    def __init__(self, ranks: list[_Rank]) -> None:
        self.ranks, self.now, self._last = ranks, 0.0, time.monotonic()
        self._waited = [0.0 for _ in ranks]

    def tick(self) -> float:
        """The time now."""
        last, self._last = self._last, time.monotonic()
        before, self._waited = self._waited, [_waited(rank.pid) for rank in self.ranks]
        lost = max(new - old for new, old in zip(self._waited, before, strict=True))
        self.now += max(0.0, self._last - last - max(0.0, lost))
        return self.now


def _waited(pid: int) -> float:
    """Seconds that a process has been ready to run without a core."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0  # it has ended


def run_file(plan: Plan, file: str, wanted: Collection[str] | None = None) -> list[Result]:
    """Run the tests of a file (of upstream's tests/unit_tests), or some of them."""
    results: dict[str, Result] = {}
    tests: list[str] = []
    while True:
        ranks = [_start(plan, file, rank, wanted, port) for rank, port in _places(plan)]
        try:
            cut = _watch(ranks, plan, file)
        finally:
            _kill(ranks)
        tests = tests or max((rank.tests for rank in ranks), key=len)
        results.update(_joined(ranks))
        if cut is not None:
            results[cut.test] = cut
        left = [test for test in tests if test not in results]
        if not left or (wanted is not None and len(left) >= len(wanted)):
            return [results[test] for test in sorted(results, key=_by(tests))]
        wanted = left


def _by(tests: list[str]) -> Callable[[str], int]:
    places = {test: place for place, test in enumerate(tests)}
    return lambda test: places.get(test, -1)


def _places(plan: Plan) -> list[tuple[int, int]]:
    port = free_port()
    return [(rank, port) for rank in range(plan.ranks)]


def _start(plan: Plan, file: str, rank: int, wanted: Collection[str] | None, port: int) -> _Rank:
    events = plan.sandbox / f"events{rank}"
    events.unlink(missing_ok=True)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = _rank_main(plan, file, rank, Recorder(events, wanted), port)
        finally:
            os._exit(status)
    return _Rank(pid, events)


def _rank_main(plan: Plan, file: str, rank: int, recorder: Recorder, port: int) -> int:
    os.setsid()  # so that `_kill` reaches whatever the rank starts
    log = os.open(
        plan.logs / f"{file.replace('/', '.')}.{rank}",
        os.O_WRONLY | os.O_CREAT | os.O_APPEND,
        0o644,
    )
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
    resource.setrlimit(resource.RLIMIT_DATA, (plan.memory, plan.memory))
    _small_stacks()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(plan.ranks),
        LOCAL_WORLD_SIZE=str(plan.ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    sandbox.enter(plan.sandbox)
    if recorder.wanted is not None:
        sandbox.start_distributed()
    base = plan.sandbox / "tmp" / f"rank{rank}"
    options = ["-c", os.devnull, "--rootdir", ".", "--basetemp", str(base), "-o", "addopts="]
    for plugin in ("cacheprovider", "xdist", "hypothesispytest", "anyio"):
        options += ["-p", f"no:{plugin}"]
    options += ["-v", "-rN"]
    options += ["--tb", "native"]  # pytest's own reads the source of each frame: slow, and large
    return pytest.main([*options, *plan.pytest_args, f"tests/unit_tests/{file}"], [recorder])


def _small_stacks() -> None:
    """Give the threads that this process starts from now on a stack of `_STACK_BYTES`."""
    libc, attributes = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    libc.pthread_attr_init(attributes)
    libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(_STACK_BYTES))
    libc.pthread_setattr_default_np(attributes)


def _watch(ranks: list[_Rank], plan: Plan, file: str) -> Result | None:
    """Wait until all ranks have ended, or until they must be; returns what is cut off, if any."""
    clock = _Clock(ranks)
    while True:
        now = clock.tick()
        for rank in ranks:
            rank.poll(now)
        cut = _dead(ranks, file) or _late(ranks, plan.limit, file, now) or _deserted(ranks, now)
        if cut is not None or _parted(ranks) or all(rank.status is not None for rank in ranks):
            return cut
        time.sleep(_POLL_SECONDS)


def _dead(ranks: list[_Rank], file: str) -> Result | None:
    for rank in ranks:
        if rank.status is None or rank.status in range(6):  # pytest's own
            continue
        return Result(rank.at or file, FAILED, f"Died: with status {rank.status}")
    return None


def _late(ranks: list[_Rank], limit: float, file: str, now: float) -> Result | None:
    """The first test, in their order, that a rank has been at for too long."""
    late = [rank for rank in ranks if rank.status is None and now - rank.since > limit]
    late = [rank for rank in late if rank.at or now - rank.since > max(limit, _START_SECONDS)]
    if not late:
        return None
    first = min(late, key=lambda rank: rank.order(rank.at or ""))
    stacks(late)
    return Result(first.at or file, FAILED, f"TimeLimit: more than {limit:.0f} s", limit)


def _deserted(ranks: list[_Rank], now: float) -> Result | None:
    """A test that has failed on one rank and does not end on another."""
    for rank in ranks:
        for test, result in rank.done.items():
            if result.outcome != FAILED or now - rank.ended_at[test] < _GRACE_SECONDS:
                continue
            if any(test not in other.done and other.status is None for other in ranks):
                return result
    return None


def _parted(ranks: list[_Rank]) -> bool:
    """Whether a test is over that failed on some ranks and not on others."""
    common = set.intersection(*(set(rank.done) for rank in ranks))
    return any(len({rank.done[test].outcome == FAILED for rank in ranks}) > 1 for test in common)


def _joined(ranks: list[_Rank]) -> dict[str, Result]:
    """The tests that are over on all ranks; a failure is that of the rank that failed first."""
    common = [test for test in ranks[0].done if all(test in rank.done for rank in ranks)]
    return {test: _of_all(test, ranks) for test in common}


def _of_all(test: str, ranks: list[_Rank]) -> Result:
    results = [rank.done[test] for rank in sorted(ranks, key=lambda rank: rank.ended_at[test])]
    for outcome in (FAILED, PASSED, SKIPPED):
        for result in results:
            if result.outcome == outcome:
                return result
    raise AssertionError(f"{test} has no outcome")


def stacks(ranks: list[_Rank]) -> None:
    """Let ranks write where they are into their logs."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank.pid, signal.SIGUSR1)
    time.sleep(0.3)


def _kill(ranks: list[_Rank]) -> None:
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(rank.pid, signal.SIGKILL)
        if rank.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGKILL)
            os.waitpid(rank.pid, 0)
        shutil.rmtree(rank.events.with_name("tmp"), ignore_errors=True)
    ranks[0].events.with_name("tmp").mkdir(exist_ok=True)
