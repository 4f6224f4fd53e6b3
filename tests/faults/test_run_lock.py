"""One run per folder: who else comes is refused by name, what is left of the dead is taken over."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import pytest

from tests.ranks import RanksFailed
from tests.training_runs import run_pretrain, tiny_gpt
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.faults import run_lock
from ultramem_megatron.faults.holder import as_text, from_text, this_process
from ultramem_megatron.faults.run_lock import LOCK, RunLock, only_run, require_own_folders

_HOLD = """
import sys, time
from ultramem_megatron.faults import run_lock
run_lock.SETTLE_SECONDS = 0.5
with run_lock.only_run(sys.argv[1]):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def _hold(folder, seconds: float) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder), str(seconds)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    for name, seconds in (("BEAT", 0.05), ("STALE", 0.5), ("SETTLE", 0.1)):
        monkeypatch.setattr(run_lock, f"{name}_SECONDS", seconds)


def _left_by(folder, **changes):
    """The lock of a process, as it was left."""
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(as_text(dataclasses.replace(this_process(), **changes)))


def test_a_second_run_is_refused_with_the_name_of_the_first(tmp_path):
    with only_run(str(tmp_path)), pytest.raises(RanksFailed) as refused:
        run_pretrain(1, tiny_gpt(save=tmp_path, save_interval=2))
    assert f"UltraMemError: --save {tmp_path} is in use by another run" in str(refused.value)
    assert f"process {os.getpid()} on " in str(refused.value)
    assert list(tmp_path.iterdir()) == []  # nothing was written, the lock is released
    run_pretrain(1, tiny_gpt(save=tmp_path, save_interval=2))
    assert not (tmp_path / LOCK).exists()


def test_what_a_killed_run_leaves_is_taken_over_at_once(tmp_path, capsys):
    killed = _hold(tmp_path, 60)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "held\n"
    with pytest.raises(UltraMemError, match=f"process {killed.pid} on"), only_run(str(tmp_path)):
        pass
    os.kill(killed.pid, signal.SIGSTOP)  # a stopped one is there
    with pytest.raises(UltraMemError, match=f"process {killed.pid} on"), only_run(str(tmp_path)):
        pass
    os.kill(killed.pid, signal.SIGKILL)
    os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)  # dead, not reaped
    with only_run(str(tmp_path)):
        assert f"was held by process {killed.pid} on" in capsys.readouterr().out
        require_own_folders()
    killed.communicate()


def test_the_number_of_a_process_that_came_again_is_no_run(tmp_path):
    _left_by(tmp_path, started="1")
    with only_run(str(tmp_path)):
        pass


def test_another_host_is_there_while_its_heart_beats(tmp_path):
    """Its clock may say anything: only the file's own times count."""
    _left_by(tmp_path, boot="another", host="node7")
    os.utime(tmp_path / LOCK, (1, 1))
    stop = threading.Event()

    def beat():
        tick = 1
        while not stop.wait(0.02):
            tick += 1
            os.utime(tmp_path / LOCK, (tick, tick))

    beating = threading.Thread(target=beat)
    beating.start()
    with pytest.raises(UltraMemError, match="on node7"), only_run(str(tmp_path)):
        pass
    stop.set()
    beating.join()
    with only_run(str(tmp_path)):
        assert "node7" not in (tmp_path / LOCK).read_text()


def test_another_host_is_waited_for_before_it_is_gone(tmp_path):
    _left_by(tmp_path, boot="another")
    started = time.monotonic()
    with only_run(str(tmp_path)):
        assert time.monotonic() - started >= run_lock.STALE_SECONDS


@pytest.mark.parametrize("text", [b"", b"null", b"[1]", b"{}", b'{"process": "x"}', b"\xff"])
def test_a_lock_that_says_nothing_is_judged_by_its_heartbeat(tmp_path, text):
    assert from_text(text).is_alive() is None
    (tmp_path / LOCK).write_bytes(text)
    os.utime(tmp_path / LOCK, (1, 1))
    with only_run(str(tmp_path)):
        pass


def test_of_many_that_come_at_once_one_gets_it(tmp_path):
    for left in (False, True):
        if left:
            _left_by(tmp_path, started="1")
        many = [_hold(tmp_path, 2.5) for _ in range(4)]
        errors = [process.communicate()[1] for process in many]
        assert sorted(error.count("is in use by another run") for error in errors) == [0] + 3 * [1]


def test_a_run_that_lost_its_folder_writes_no_more(tmp_path):
    with only_run(str(tmp_path)):
        _left_by(tmp_path, host="node8")
        with pytest.raises(UltraMemError, match=r"taken over by another run \(process .* node8"):
            require_own_folders()
    assert "node8" in (tmp_path / LOCK).read_text()  # it is not ours to release


def test_without_links(tmp_path, monkeypatch):
    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with only_run(str(tmp_path)):
        require_own_folders()
        with pytest.raises(UltraMemError, match="in use"), only_run(str(tmp_path)):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UltraMemError, match="cannot be written to: Not a directory"):
        RunLock(tmp_path / "file" / "below").take()


def test_only_rank_0_with_a_folder_holds_one(tmp_path, monkeypatch):
    with ExitStack() as stack:
        stack.enter_context(only_run(None))
        monkeypatch.setenv("RANK", "1")
        stack.enter_context(only_run(str(tmp_path / "save")))
        assert not (tmp_path / "save").exists()
