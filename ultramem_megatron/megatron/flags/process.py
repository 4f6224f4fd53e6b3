"""Opening a process: everything that comes before Megatron is used in it."""

import os
import socket
import sys
from collections.abc import Collection, Sequence

from ultramem_megatron.faults.launcher_environment import check_launcher_environment
from ultramem_megatron.faults.orphans import end_with_launcher
from ultramem_megatron.faults.unseen_gpus import warn_of_unseen_gpus
from ultramem_megatron.megatron.flags import machine_flags
from ultramem_megatron.megatron.upstream_noise import hold_back_upstream_noise
from ultramem_megatron.patches import registry


def open_process(
    flags: Sequence[str] | None = None,
    *,
    program: str | None = None,
    patches: Collection[str] | None = None,
) -> None:
    """Make this process a rank: its launcher's, or the only one of a world of its own.

    The rank ends with its launcher, and Megatron is patched; a second call changes nothing.

    Args:
        flags: Megatron's and ours, put into sys.argv with those that this machine needs besides;
            None leaves the command line alone.
        program: the first word of that command line; None keeps the present one.
        patches: names of the patches to apply; None applies all that this machine needs.
    """
    end_with_launcher()
    set_single_process_environment()
    warn_of_unseen_gpus()
    hold_back_upstream_noise()
    registry.apply_all(patches)
    if flags is not None:
        sys.argv = [program or sys.argv[0], *machine_flags.complete(flags)]


def set_single_process_environment() -> None:
    """Describe a world of one process in the environment, where no launcher did.

    Raises UltraMemError for half a launcher's environment.
    """
    check_launcher_environment()
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free_port = probe.getsockname()[1]
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port),
    }.items():
        os.environ.setdefault(name, value)
