"""A Slurm cluster of two nodes on this machine: real daemons, without root's files or systemd.

    with slurm_cluster(folder) as cluster:
        job = cluster.submit(["launch/slurm/train.sbatch", ...])
        cluster.wait_for_end(job)

Everything lives in `folder`. Needs root, slurmctld, slurmd and munged (Debian: slurm-wlm, munge).
"""

import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import which

from tests.launched import is_running

_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=5,bf_interval=5
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=10
JobRequeue=1
NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=2 \
RealMemory=1000
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
"""
# cred_expire: a requeued job waits for old credentials to expire, by default two minutes.


def why_not() -> str | None:
    """What is missing on this machine; None if a cluster can be made."""
    missing = [t for t in ("slurmctld", "slurmd", "munged", "sbatch") if which(t) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    return None if os.geteuid() == 0 else "needs root"


def _three_free_ports() -> list[int]:
    """Following each other."""
    for first in range(17000, 18000, 3):
        with suppress(OSError), socket.socket() as a, socket.socket() as b, socket.socket() as c:
            for probe, port in zip((a, b, c), range(first, first + 3), strict=True):
                probe.bind(("127.0.0.1", port))
            return [first, first + 1, first + 2]
    raise OSError("no free ports from 17000 to 18000")


def _wait(condition: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"after {seconds} s: {what()}"
        time.sleep(0.1)


@dataclass(frozen=True)
class Cluster:
    """Talks to the daemons as users do, through Slurm's own commands."""

    configuration: Path

    def command(self, words: Sequence[str], env: Mapping[str, str] | None = None) -> str:
        """What a Slurm command prints."""
        environment = {**os.environ, "SLURM_CONF": str(self.configuration), **(env or {})}
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.returncode} {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, words: Sequence[str], env: Mapping[str, str]) -> int:
        """The number of the job."""
        return int(self.command(["sbatch", "--parsable", *words], env))

    def state(self, job: int) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        asked = ["scontrol", "--oneliner", "show", "job", str(job)]
        try:
            shown = self.command(asked)
        except AssertionError:  # on a busy machine it dies now and then, without a word
            time.sleep(1)
            shown = self.command(asked)
        return dict(word.partition("=")[::2] for word in shown.split())["JobState"]

    def wait_for_end(self, job: int, seconds: float, output: Path) -> str:
        """The state it ends in."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
        _wait(lambda: self.state(job) in ended, seconds, output.read_text)
        return self.state(job)


def _stop(cluster: Cluster, pids: Sequence[int]) -> None:
    """Jobs first, where the controller answers: a slurmd waits for its steps."""
    with suppress(AssertionError):
        for job in cluster.command(["squeue", "--noheader", "--format=%i"]).split():
            cluster.command(["scancel", job])
        _wait(lambda: not cluster.command(["squeue", "--noheader"]), 30, lambda: "jobs remain")
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        with suppress(AssertionError):
            _wait(lambda: not any(map(is_running, pids)), 10, lambda: "daemons remain")


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """Start the daemons; stop them and their jobs at the end."""
    folder.chmod(0o755)  # munge insists
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    configuration = folder / "slurm.conf"
    configuration.write_text(
        _CONFIGURATION.format(
            folder=folder, host=socket.gethostname().partition(".")[0], ports=_three_free_ports()
        )
    )
    (folder / "state").mkdir()
    cluster = Cluster(configuration)
    cluster.command(
        [
            "munged",
            "--force",
            f"--key-file={key}",
            f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munged.pid",
            f"--log-file={folder}/munged.log",
            f"--seed-file={folder}/munge.seed",
        ]
    )
    try:
        cluster.command(["slurmctld", "-c", "-f", str(configuration)])
        for node in (1, 2):
            cluster.command(["slurmd", "-c", "-f", str(configuration), "-N", f"node{node}"])
        idle = ["sinfo", "--noheader", "--format=%T %D"]
        _wait(lambda: cluster.command(idle) == "idle 2", 30, lambda: cluster.command(idle))
        yield cluster
    finally:
        _stop(cluster, [int(file.read_text()) for file in folder.glob("*.pid")])
