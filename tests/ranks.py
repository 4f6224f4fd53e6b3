"""Run a function on several ranks (gloo, CPU), each a fresh process.

The ranks are forked from one server process that has imported torch and Megatron already: a rank
starts in about a tenth of a second, with global state nobody has touched but for what
tests/preloaded.py says. Test modules should import Megatron inside the functions they send here, so
that pytest itself need not.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests import ROOT

_PRELOADED = (
    "pytest",
    "torch",
    "megatron.core",
    "megatron.core.dist_checkpointing",
    "megatron.core.tokenizers.text",  # brings transformers: 0.7 s
    "megatron.training",
    "megatron.training.argument_utils",
    "ultramem_megatron.training.pretrain",
    "ultramem_megatron.training.gpt_datasets",
    "ultramem_megatron.training.gpt_step",
    "torch.utils.tensorboard",
    "tests.preloaded",
)
_GRACE_SECONDS = 3.0
"""How long the other ranks may go on after one has failed; they usually wait for it for ever."""
_OUTPUT_LINES = 60
_LISTENED_AT = range(15000, 32000)


class RanksFailed(AssertionError):  # noqa: N818 - reads as what happened
    """Some rank raised, died or hung; the message holds every rank's traceback and output."""


def run_on_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
    print_output: bool = False,
) -> list[Any]:
    """Call `function(*args)` in `world_size` processes and return what each returned.

    The function is found by name, so it must stand at the top level of its module; its arguments
    and results must pickle. RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set as
    torchrun does; torch.distributed is NOT initialised (Megatron does that, or call `init_gloo`).

    Args:
        world_size: number of processes.
        function: what to run.
        args: its arguments, the same on every rank.
        timeout: seconds after which ranks still running are shown (with stacks) and killed.
        env: further environment variables, over the present environment of this process.
        print_output: pass on what the ranks printed even if all went well.

    Returns:
        One result per rank.

    Raises:
        RanksFailed: a rank raised, died or did not finish in time.
    """
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        processes = _start(world_size, function, args, Path(folder), {**os.environ, **(env or {})})
        hanging = _join(processes, timeout)
        if print_output:
            print(_outputs(Path(folder), range(world_size)))
        return _results(Path(folder), processes, hanging, timeout)


def init_gloo() -> tuple[int, int]:
    """Initialise torch.distributed in a rank; returns (rank, world size)."""
    import torch.distributed

    torch.distributed.init_process_group("gloo")
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def free_port() -> int:
    """A TCP port of this machine that nobody uses now.

    Below those that systems give to outgoing connections, which could take it before its user does.
    """
    for port in random.SystemRandom().sample(_LISTENED_AT, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port among a hundred")


def _server() -> Any:
    """The fork server's context; the first process started from it pays for the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    # OpenMP reads its variable when its library is loaded, so the server must have it already.
    settings = {
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    saved = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        from multiprocessing.forkserver import ensure_running

        ensure_running()
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
    return context


def _start(
    world_size: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    folder: Path,
    environment: dict[str, str],
) -> list[BaseProcess]:
    context = _server()
    shared = {
        **environment,
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    processes = []
    for rank in range(world_size):
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        # Not a daemon: saving a checkpoint starts processes of its own.
        process = context.Process(target=_rank_main, args=(function, args, folder, rank, own))
        process.start()
        processes.append(process)
    return processes


def _rank_main(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    folder: Path,
    rank: int,
    environment: dict[str, str],
) -> None:
    """Body of one rank: output goes to a file, the result or the traceback to another."""
    os.setsid()  # so that `_kill` reaches whatever this rank starts
    output = open(folder / f"{rank}.out", "w", buffering=1)  # noqa: SIM115 - for the whole process
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = output
    faulthandler.register(signal.SIGUSR1, file=output, all_threads=True)
    os.environ.clear()
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    try:
        _write_result(folder, rank, "returned", function(*args))
    except BaseException:
        _write_result(folder, rank, "raised", traceback.format_exc())
        sys.exit(1)
    finally:
        output.flush()


def _write_result(folder: Path, rank: int, status: str, value: Any) -> None:
    # torch.save rather than pickle: a tensor pickled where Megatron is imported makes the reader
    # import Megatron too.
    import torch

    partial = folder / f"{rank}.partial"
    torch.save((status, value), partial)
    partial.rename(folder / f"{rank}.result")


def _read_result(folder: Path, rank: int) -> tuple[str, Any, float]:
    """Status, value, and when it was written (a rank that wrote nothing comes last)."""
    import torch

    file = folder / f"{rank}.result"
    if not file.exists():
        return "none", None, float("inf")
    status, value = torch.load(file, weights_only=False)
    return status, value, file.stat().st_mtime


def _join(processes: Sequence[BaseProcess], timeout: float) -> list[int]:
    """Wait for all ranks; returns those that had to be killed."""
    deadline = time.monotonic() + timeout
    running = dict(enumerate(processes))
    try:
        while running and time.monotonic() < deadline:
            wait([process.sentinel for process in running.values()], deadline - time.monotonic())
            for rank, process in list(running.items()):
                if process.exitcode is None:
                    continue
                del running[rank]
                if process.exitcode != 0:
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    finally:
        _kill(list(running.values()))
    for process in processes:
        process.join()
    return sorted(running)


def _kill(processes: Sequence[BaseProcess]) -> None:
    """End ranks that did not end by themselves, after they have written their stacks."""
    _signal(processes, os.kill, signal.SIGUSR1)  # faulthandler
    if processes:
        time.sleep(0.3)
    _signal(processes, os.killpg, signal.SIGKILL)


def _signal(
    processes: Sequence[BaseProcess], send: Callable[[int, int], None], number: int
) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself after all
            if process.pid is not None:
                send(process.pid, number)


def _results(
    folder: Path, processes: Sequence[BaseProcess], hanging: Sequence[int], timeout: float
) -> list[Any]:
    results = [_read_result(folder, rank) for rank in range(len(processes))]
    failures = {}
    for rank, (status, value, _) in enumerate(results):
        if status == "raised":
            failures[rank] = f"rank {rank} raised:\n{value}"
        elif rank in hanging:
            failures[rank] = f"rank {rank} was still running and was killed (limit {timeout} s)."
        elif status == "none":
            failures[rank] = f"rank {rank} died with exit code {processes[rank].exitcode}."
    if failures:
        # The first to fail is usually the cause, the others lost their partner.
        shown = "\n".join(failures[rank] for rank in sorted(failures, key=lambda r: results[r][2]))
        raise RanksFailed(f"{shown}\n{_outputs(folder, range(len(processes)))}")
    return [value for _, value, _ in results]


def _outputs(folder: Path, ranks: Sequence[int]) -> str:
    parts = []
    for rank in ranks:
        file = folder / f"{rank}.out"
        lines = file.read_text(errors="replace").splitlines() if file.exists() else []
        tail = "\n".join(lines[-_OUTPUT_LINES:])
        parts.append(f"----- output of rank {rank}, last {_OUTPUT_LINES} lines -----\n{tail}")
    return "\n".join(parts)
