"""Two hosts on one machine: network namespaces with names, addresses and a link that can be cut.

Needs root on Linux. Nothing is added to the machine's own network.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import which

_PREPARE = 'mount --bind "$1" /etc/hosts; hostname "$2"; shift 2; exec "$@"'


def why_not() -> str | None:
    """What is missing on this machine; None if two hosts can be made."""
    missing = [tool for tool in ("ip", "nsenter", "unshare") if which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    if os.geteuid() != 0:
        return "needs root"
    made = subprocess.run(["ip", "netns", "add", f"probe{os.getpid()}"], capture_output=True)
    if made.returncode == 0:
        subprocess.run(["ip", "netns", "del", f"probe{os.getpid()}"], check=True)
        return None
    return f"no network namespaces: {made.stderr.decode().strip()}"


@dataclass(frozen=True)
class TwoHosts:
    """node1 (10.77.0.11) and node2 (10.77.0.12) on a switch."""

    name: str
    hosts_file: Path

    def on(self, node: int) -> list[str]:
        """Words before a command that runs it on node 1 or 2."""
        enter = ["nsenter", f"--net=/run/netns/{self.name}{node}", "unshare", "--mount", "--uts"]
        return [*enter, "sh", "-c", _PREPARE, "sh", str(self.hosts_file), f"node{node}"]

    def set_link(self, node: int, state: str) -> None:
        """Unplug a node (`down`) or plug it in again (`up`)."""
        _ip("-n", f"{self.name}0", "link", "set", f"port{node}", state)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Put the hosts up; take them down at the end."""
    name = f"hosts{os.getpid()}x"
    hosts_file = folder / "hosts"
    hosts_file.write_text("127.0.0.1 localhost\n10.77.0.11 node1\n10.77.0.12 node2\n")
    spaces = [f"{name}{node}" for node in range(3)]
    try:
        for space in spaces:
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
        switch = spaces[0]
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        for node in (1, 2):
            port, space = f"port{node}", spaces[node]
            _ip(
                "-n",
                switch,
                "link",
                "add",
                port,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                space,
            )
            _ip("-n", switch, "link", "set", port, "master", "switch", "up")
            _ip("-n", space, "address", "add", f"10.77.0.1{node}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
        yield TwoHosts(name, hosts_file)
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)  # made or not
