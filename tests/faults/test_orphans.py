"""What is killed with whom: ranks with torchrun, their forks with them."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.launched import is_running

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")

_RANK = """
import os, threading, time
from ultramem_megatron.faults.orphans import end_with_launcher

end_with_launcher()

def fork(name):
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    print(name, pid, flush=True)

fork("of_main_thread")
passing = threading.Thread(target=fork, args=("of_passing_thread",))
passing.start()
passing.join()
print("ready", os.getpid(), flush=True)
time.sleep(60)
"""


def _start(launcher: int) -> "subprocess.Popen[str]":
    settings = {"TORCHELASTIC_RUN_ID": "test", "ULTRAMEM_TORCHRUN_PID": str(launcher)}
    return subprocess.Popen(
        [sys.executable, "-c", _RANK],
        env={**os.environ, **settings},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _gone_within(pid: int, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < until:
        time.sleep(0.01)
    return not is_running(pid)


def test_forks_end_with_a_killed_rank_but_not_with_a_thread_of_it():
    rank = _start(os.getpid())
    assert rank.stdout is not None
    pids = {}
    for line in rank.stdout:
        name, pid = line.split()
        pids[name] = int(pid)
        if name == "ready":
            break
    try:
        time.sleep(0.2)  # its thread has ended long since
        assert is_running(pids["of_passing_thread"])
        os.kill(rank.pid, signal.SIGKILL)
        rank.wait()
        assert _gone_within(pids["of_main_thread"], 5)
        assert is_running(pids["of_passing_thread"])  # the kernel would have gone by its thread
    finally:
        rank.kill()
        os.kill(pids["of_passing_thread"], signal.SIGKILL)


def test_a_launcher_that_died_first_is_noticed():
    rank = _start(launcher=1)
    _, errors = rank.communicate(timeout=30)
    assert rank.returncode == 1
    assert "torchrun, which started this rank, is gone." in errors
