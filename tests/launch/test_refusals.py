"""A refusal ends a launch once and for all, its message in the last line; wrappers of python."""

import os
import signal
import stat
import sys
import time

import pytest

from tests.launched import descendants, flags, is_running, launch
from ultramem_megatron.faults.integrity import newest_whole
from ultramem_megatron.faults.run_lock import LOCK

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--ultramem-spans", "1:9"], "error: --ultramem-spans 1:9: span 1:9 leaves the model"),
        (["--ultramem-sapns", "1:2"], "error: Wrong flags: unrecognized arguments: --ultramem-sap"),
        (["--min-lr", "9"], "error: Megatron refuses these flags: assert args.min_lr <= args.lr"),
    ],
)
def test_what_is_refused_is_not_tried_again(tmp_path, wrong, said):
    with launch(tmp_path, [*flags(tmp_path), *wrong], env={"MAX_RESTARTS": "3"}) as run:
        assert run.wait() == 2
    assert run.output().splitlines()[-1].startswith(said)
    assert run.iterations() == []
    assert not list(run.logs.glob("*/attempt_1/*/stdout.log"))


def _wrapper(folder):
    """A program that calls python and stays, as numactl, nsys or apptainer do; its path."""
    wrapper = folder / "python"
    wrapper.write_text(f'#!/bin/bash\n{sys.executable} "$@"\n')
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    return str(wrapper)


def _gone_within(processes, seconds):
    until = time.monotonic() + seconds
    while any(is_running(process) for process in processes) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(is_running(process) for process in processes)


def test_one_launch_for_a_folder_until_its_end(tmp_path):
    """A second is refused, kill -9 of the script ends its ranks, storms of signals save once."""
    arguments = flags(tmp_path, train_iters=100_000, save_interval=50)
    settings = {"PYTHON": _wrapper(tmp_path)}
    with launch(tmp_path, arguments, env=settings) as first:
        first.wait_for_iteration(50)
        with launch(tmp_path, arguments, name="second") as second:
            assert second.wait() == 2
        last = second.output().splitlines()[-1]
        assert last.startswith(f"error: --save {tmp_path / 'checkpoints'} is in use by another run")
        assert second.iterations() == []
        below = descendants(first.process.pid)
        assert len(below) >= 3  # wrapper, torchrun, ranks
        os.kill(first.process.pid, signal.SIGKILL)
        assert _gone_within(below, 10)
    with launch(tmp_path, arguments, env=settings, name="third") as third:
        third.wait_for(r"iteration +\d+/")
        for number in range(30):
            os.kill(third.process.pid, (signal.SIGTERM, signal.SIGHUP)[number % 2])
            time.sleep(0.05)
        assert third.wait() == 0
    assert "was held by process" in third.output()
    assert third.output().count("exiting program after receiving SIGTERM") == 1
    checkpoints = tmp_path / "checkpoints"
    last_saved = int((checkpoints / "latest_checkpointed_iteration.txt").read_text())
    assert last_saved == third.iterations()[-1] > 50
    assert newest_whole(checkpoints) == last_saved
    assert not (checkpoints / LOCK).exists()
