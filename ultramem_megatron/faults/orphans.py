"""No rank outlives torchrun, and no process that a rank started for itself outlives the rank.

Else they would go on as orphans, beside whatever is started in their place and writes to the same
folders.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def end_with_launcher() -> None:
    """Have the kernel kill this rank when torchrun is gone, even by SIGKILL; forks go with it.

    Does nothing without torchrun or outside Linux. Environment: ULTRAMEM_TORCHRUN_PID, which
    launch/torchrun.sh sets to the process whose child this rank is (a wrapper of python may stand
    between them): with it, a torchrun that died before this call is noticed too.

    Raises SystemExit if torchrun is gone already.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    launcher = int(os.environ.get("ULTRAMEM_TORCHRUN_PID", os.getppid()))
    set_signal = _death_signal()
    set_signal()
    if os.getppid() != launcher and not any(map(_is_torchrun, _ancestors())):
        sys.exit("torchrun, which started this rank, is gone.")  # before the kernel was told
    _let_forks_follow(set_signal)


def _ancestors() -> Iterator[int]:
    """Parent, its parent, and so on; an orphan's are init, or whoever takes in orphans."""
    pid = os.getppid()
    while pid > 1:
        yield pid
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return
        pid = int(stat.rpartition(")")[2].split()[1])


def _is_torchrun(pid: int) -> bool:
    """Whether a process runs what launch/torchrun.sh starts."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"torch.distributed.run" in words


def end_with_parent() -> None:
    """Have the kernel kill this process, which multiprocessing started, when its parent is gone.

    Does nothing outside Linux. Raises SystemExit if the parent is gone already.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not sys.platform.startswith("linux"):
        return
    _death_signal()()
    if os.getppid() != parent.pid:
        sys.exit(1)


def _death_signal() -> Callable[[], None]:
    """A call for the process to be ended. Loaded here: a fork shall only call."""
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _let_forks_follow(set_signal: Callable[[], None]) -> None:
    """For what the main thread forks: the kernel goes by the thread, and others may end sooner."""
    forking: list[int] = []

    def before() -> None:
        is_main = threading.current_thread() is threading.main_thread()
        forking[:] = [os.getpid()] if is_main else []

    def in_child() -> None:
        if forking:
            set_signal()
            if os.getppid() != forking[0]:
                os._exit(1)

    os.register_at_fork(before=before, after_in_child=in_child)
