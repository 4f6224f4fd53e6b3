"""Who holds something: a process, told apart from any other of any host, and whether it lives."""

import dataclasses
import json
import os
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE = Path("/proc/self/ns/pid")
_STARTED = 19  # of the words after the name in /proc/<pid>/stat: clock ticks since boot
_GONE = ("Z", "X")


@dataclass(frozen=True)
class Holder:
    """A process. Numbers of processes come again, names of hosts are shared by containers."""

    host: str = "an unknown host"
    boot: str = ""
    """Boot of the host's kernel and namespace of its process numbers; empty: not known."""
    process: int = 0
    started: str = ""
    """When the process began, as the kernel counts."""
    since: str = "an unknown time"
    token: str = ""

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"

    def is_alive(self) -> bool | None:
        """Whether the process runs here; None if it cannot be seen from here."""
        # Where others' processes are hidden, so is the first one.
        if not self.boot or self.boot != _boot() or not Path("/proc/1").exists():
            return None
        try:
            return self.started == _started(self.process)
        except PermissionError:
            return None


def this_process() -> Holder:
    """The calling process; every call makes another token."""
    return Holder(
        host=socket.gethostname(),
        boot=_boot(),
        process=os.getpid(),
        started=_started(os.getpid()) or "",
        since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        token=secrets.token_hex(8),
    )


def as_text(holder: Holder) -> str:
    """JSON, to be read by people too."""
    return json.dumps(dataclasses.asdict(holder), indent=1) + "\n"


def from_text(text: bytes) -> Holder:
    """What `as_text` made; anything else is a holder of whom nothing is known."""
    try:
        found = json.loads(text)
        holder = Holder(**{**found, "process": int(found["process"])})
    except (ValueError, TypeError, KeyError, RecursionError):
        return Holder()
    texts = (holder.host, holder.boot, holder.started, holder.since, holder.token)
    return holder if all(isinstance(text, str) for text in texts) else Holder()


def _boot() -> str:
    try:
        return f"{_BOOT.read_text().strip()} {os.readlink(_NAMESPACE)}"
    except OSError:  # no Linux
        return ""


def _started(process: int) -> str | None:
    """None for a process that is gone, or dead and not yet reaped."""
    try:
        words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if words[0] in _GONE else words[_STARTED]
